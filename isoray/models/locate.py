"""Find what ``model.path`` names: a Transformers folder, a GGUF file or a model on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isoray.config.base import nearest
from isoray.errors import InfraError, UserError

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""What is fetched from the hub: never pickled weights, never code."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Location:
    """What a path turned out to be; ``path`` is the folder or the .gguf file (for the hub: not fetched yet)."""

    kind: Literal["transformers", "adapter", "gguf", "hub"]
    path: Path


def locate(path: str, *, what: str = "model.path") -> Location:
    """What ``path`` names. Looks at local files only. UserError, with the nearest name, for what is not there."""
    local = Path(path).expanduser()
    if local.is_dir():
        return _folder(local, what)
    if local.is_file():
        if local.suffix == ".gguf":
            return Location("gguf", local)
        raise UserError(f"{what}: {path} is a file that is no .gguf; give a .gguf file or the folder of a model.")
    if _looks_local(path, local):
        raise UserError(f"{what}: {path} does not exist; {_nearest_sibling(local)}")
    return Location("hub", Path(path))


def fetch(path: str, *, revision: str | None = None, code: bool = False, what: str = "model.path") -> Path:
    """The local folder of hub id ``path``, fetched on the first call; with ``code``, its Python files too.

    UserError if the hub has no such model or does not let us read it; InfraError if the hub cannot be reached.
    """
    import huggingface_hub.errors
    from huggingface_hub import snapshot_download

    hub: Any = huggingface_hub.errors  # HTTPError is that of whatever HTTP library the client is built on
    try:
        patterns = [*HUB_FILES, "*.py"] if code else HUB_FILES
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as error:
        raise UserError(
            f"{what}: {path} is neither a local folder ({_nearest_sibling(Path(path))}) nor a model that the Hugging "
            "Face hub shows you. Check the spelling; for a gated model accept its terms and set HF_TOKEN."
        ) from error
    except (hub.HTTPError, OSError) as error:
        raise InfraError(
            f"{what}: {path} is no local folder, and the Hugging Face hub could not be reached "
            f"({type(error).__name__}). Run again with a connection, set HF_ENDPOINT to a mirror, or copy the model "
            "here and give its folder."
        ) from error


def _folder(folder: Path, what: str) -> Location:
    if (folder / "adapter_config.json").is_file():
        return Location("adapter", folder)
    if (folder / "config.json").is_file():
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"{what}: {folder} has a config.json but no *.safetensors. Pickled weights are not read; convert them "
                "with Transformers: model.save_pretrained(folder)."
            )
        return Location("transformers", folder)
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return Location("gguf", found[0])
    if found:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{what}: {folder} holds {len(found)} .gguf files; name one: {names}")
    raise UserError(f"{what}: {folder} holds neither a Transformers model (config.json) nor a .gguf file.")


def _looks_local(path: str, local: Path) -> bool:
    if path.endswith(".gguf") or not _HUB_ID.fullmatch(path):
        return True
    return "/" in path and local.parent.is_dir()


def _nearest_sibling(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    if len(names) > 20:
        hint = nearest(path.name, names)
        return hint if hint.startswith("did you mean") else f"nothing in {parent.resolve()} has a name like it"
    return f"in {parent.resolve()}: {nearest(path.name, names)}" if names else f"{parent.resolve()} is empty"
