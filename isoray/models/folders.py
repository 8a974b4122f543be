"""Folders that appear whole or not at all, and libraries that keep quiet while they work."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from isoray.errors import DataError


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place (and name) when the block ends without an error.

    A process that is killed inside the block leaves ``folder`` as it was, and a hidden ``.<name>.<random>`` beside it.
    (Between the two renames that replace an older folder there is none; whoever finds none starts over.)
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        _open_to_others(temporary)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.replace(folder, old / folder.name)
            os.replace(temporary, folder)
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def weights_digest(folder: Path) -> str:
    """12 hex digits of the SHA-256 over the model's config and weight files (names and bytes).

    DataError if the folder holds no weights.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder} holds no *.safetensors weights.")
    configs = [path for name in ("config.json", "adapter_config.json") if (path := folder / name).is_file()]
    digest = hashlib.sha256()
    for path in [*configs, *files]:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()[:12]


def parameter_count(folder: Path) -> int:
    """Numbers stored in the folder's safetensors files, buffers included; only their headers are read."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return count


@contextmanager
def quiet() -> Iterator[None]:
    """Silences progress bars, notices and warnings of Transformers, PEFT and the hub client inside the block."""
    import huggingface_hub.utils
    from transformers.utils import logging

    chatter: Any = logging
    hub: Any = huggingface_hub.utils
    verbosity, bars, hub_silent = (
        chatter.get_verbosity(),
        chatter.is_progress_bar_enabled(),
        hub.are_progress_bars_disabled(),
    )
    chatter.set_verbosity(chatter.CRITICAL)
    chatter.disable_progress_bar()
    hub.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()
        if not hub_silent:
            hub.enable_progress_bars()


def _open_to_others(folder: Path) -> None:
    """The usual permissions: temporary folders and safetensors files are made for their owner's eyes only."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
