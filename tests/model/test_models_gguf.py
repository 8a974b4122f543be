"""The real 135M model: from its GGUF file to a Transformers folder, and back to the starting weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isoray.errors import UserError
from isoray.models.config import LoadOptions, ModelConfig
from isoray.models.load import LoadedModel, load, prepare, save, weights_digest
from isoray.models.snapshot import Snapshot

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> LoadedModel:
    return load(smollm2)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_the_folder_holds_the_model_and_tokenizer_of_the_file(gguf_folder: Path, loaded: LoadedModel) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = next(gguf_folder.glob("*.gguf")).name
    direct = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=name)
    for text in (PROMPT, "  def f(x):\n\treturn x ** 2", "naïve 猫 🏳️‍🌈\r\n", "<|im_start|>user\nhi<|im_end|>"):
        assert loaded.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert loaded.tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert torch.equal(logits(loaded.model, ids), logits(direct, ids))


def test_it_is_the_model_it_says(loaded: LoadedModel) -> None:
    assert loaded.layout == "causal"
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    assert loaded.tokenizer.decode(logits(loaded.model, ids)[0, -1].argmax()) == " Paris"


def test_the_file_is_converted_once(gguf_folder: Path, smollm2: Path) -> None:
    before = (smollm2 / "model.safetensors").stat()
    again = prepare(ModelConfig(path=str(next(gguf_folder.glob("*.gguf")))), smollm2, None, seed=1)
    assert again == smollm2
    after = (smollm2 / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_save_and_load(smollm2: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    save(loaded.model, loaded.tokenizer, tmp_path / "saved")
    assert weights_digest(tmp_path / "saved") == weights_digest(smollm2)
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    assert torch.equal(logits(load(tmp_path / "saved").model, ids), logits(loaded.model, ids))


def test_back_to_the_start_without_memory_of_its_own(smollm2: Path) -> None:
    model = load(smollm2, LoadOptions()).model
    snapshot = Snapshot(model, smollm2)
    assert snapshot.mapped_bytes == 4 * 134_515_008
    assert snapshot.cloned_bytes < 10_000
    ids = torch.tensor([[504, 3575, 282, 4649]])
    before = logits(model, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(logits(model, ids), before)
    snapshot.restore(model)
    assert torch.equal(logits(model, ids), before)


def test_a_broken_file_is_told(gguf_folder: Path, tmp_path: Path) -> None:
    whole = next(gguf_folder.glob("*.gguf")).read_bytes()
    for name, content in {"cut.gguf": whole[:3_000_000], "not.gguf": b"GGUF? no"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as a GGUF model"):
            prepare(ModelConfig(path=str(tmp_path / name)), tmp_path / "out", None, seed=0)
        assert not (tmp_path / "out").exists()
