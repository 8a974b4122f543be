"""The estimate of a worker's memory that `lanes: auto` plans with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isoray.models.config import AdapterConfig, CreateConfig, LoadOptions, ModelConfig, TokenizerConfig
from isoray.models.load import load, prepare, save
from isoray.training.memory import LIBRARIES_BYTES, worker_bytes

SMALL: dict[str, Any] = {"hidden_size": 32, "layers": 2, "context": 64, "tokenizer": TokenizerConfig(vocab_size=512)}


def made(architecture: str, out: Path) -> Path:
    config = ModelConfig(create=CreateConfig(architecture=architecture, **SMALL))
    return prepare(config, out, ["the cat sees the dog\n"] * 4, seed=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "t5", "bart"])
def test_it_grows_with_the_tokens_of_a_pass(architecture: str, tmp_path: Path) -> None:
    folder = made(architecture, tmp_path / "model")
    little, much = (worker_bytes(folder, LoadOptions(), tokens) - LIBRARIES_BYTES for tokens in (0, 1024))
    parameters = sum(parameter.numel() for parameter in load(folder).model.parameters())
    assert little >= 16 * parameters  # weights, gradients, Adam
    assert much - little >= 1024 * 2 * 4 * 32 * 10  # ten vectors of the hidden size for each of two layers


def test_an_adapter_counts_as_the_model_that_it_adapts(tmp_path: Path) -> None:
    folder = made("llama", tmp_path / "model")
    adapted = load(folder, LoadOptions(adapter=AdapterConfig()))
    save(adapted.model, adapted.tokenizer, tmp_path / "adapter", merge=False)
    assert not (tmp_path / "adapter" / "config.json").exists()
    sizes = [worker_bytes(path, LoadOptions(), 64) for path in (folder, tmp_path / "adapter")]
    assert sizes[0] == sizes[1]
