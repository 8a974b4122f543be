"""Contrast folders: what vLLM is given in place of a model folder. They name the models; no weights are copied.

``config.json`` is that of the deciding model with another architecture and one more key, the tokenizer is the deciding
model's. Only a LoRA adapter is written out, merged into its base, since vLLM loads whole models.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel

from isoray.config.base import digest_of
from isoray.errors import UserError
from isoray.generation.contrast import ContrastConfig, Role
from isoray.generation.vllm_plugin import ARCHITECTURE, KEY
from isoray.generation.vocabulary import shared_vocabulary
from isoray.models.config import LoadOptions
from isoray.models.folders import whole_folder
from isoray.models.load import base_of, load, load_tokenizer, read_config, save
from isoray.models.locate import locate


def make_contrast_folder(contrast: ContrastConfig, out: Path, options: LoadOptions | None = None) -> Path:
    """The folder ``out`` for ``contrast``, whose models are local Transformers folders or adapters' folders.

    It appears whole or not at all; if it is there already, made from the same things, it is left as it is. Raises
    UserError for models that cannot be contrasted: other tokenizers, no weights, encoder-decoders.
    """
    options = options or LoadOptions()
    folders = {role: _local(role, path) for role, path in contrast.models.items()}
    made_from = digest_of([contrast.model_dump(mode="json"), {role: _state(path) for role, path in folders.items()}])
    if (out / "config.json").is_file():
        found = json.loads((out / "config.json").read_text(encoding="utf-8")).get(KEY)
        if found is None:
            raise UserError(f"{out} holds a model, which the contrast would replace; choose another folder.")
        if found["made_from"] == made_from:
            return out
    configs = {role: read_config(base_of(path), options) for role, path in folders.items()}
    for role in folders:
        if configs[role].is_encoder_decoder:
            raise UserError(f"The {role} model is an encoder-decoder; a contrast takes decoder-only models.")
    tokenizers = {str(role): load_tokenizer(path) for role, path in folders.items()}
    vocabulary = shared_vocabulary(
        tokenizers, {str(role): int(config.get_text_config().vocab_size) for role, config in configs.items()}
    )
    first = next(iter(folders))
    with whole_folder(out) as temporary:
        for role, path in folders.items():
            if base_of(path) != path:
                loaded = load(path, options)
                assert isinstance(loaded.model, PeftModel)
                save(loaded.model, loaded.tokenizer, temporary / role)
                folders[role] = out.absolute() / role
        _write_config(temporary, contrast, folders, vocabulary, made_from, base_of(Path(contrast.models[first])))
        tokenizers[first].save_pretrained(temporary)
    return out


def read_spec(folder: Path) -> dict[str, Any]:
    """What a contrast folder says of its contrast: models, form, alpha, gamma, shared vocabulary."""
    spec: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))[KEY]
    return spec


def _local(role: Role, path: str) -> Path:
    place = locate(path, what=f"the contrast's {role} model")
    if place.kind not in ("transformers", "adapter"):
        raise UserError(
            f"the contrast's {role} model: vLLM takes local Transformers folders, not {path}; make one of it with "
            "isoray.models.load.prepare, as the recipe `generate` does by itself."
        )
    return place.path.absolute()


def _write_config(
    out: Path, contrast: ContrastConfig, folders: dict[Any, Path], vocabulary: int, made_from: str, first: Path
) -> None:
    config = json.loads((first / "config.json").read_text(encoding="utf-8"))
    contexts = [
        json.loads((base_of(path) / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
        for path in folders.values()
        if path.is_dir()
    ]
    known = [context for context in contexts if context]
    if known:
        config["max_position_embeddings"] = min(known)
    config["architectures"] = [ARCHITECTURE]
    config[KEY] = {
        "models": {role: str(path) for role, path in folders.items()},
        "form": contrast.resolved_form,
        "alpha": contrast.alpha,
        "gamma": str(contrast.gamma),  # JSON has no infinity
        "vocabulary": vocabulary,
        "made_from": made_from,
    }
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    generation = first / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, out / generation.name)


def _state(folder: Path) -> list[list[object]]:
    """What tells another version of a model's files."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.safetensors"))]
