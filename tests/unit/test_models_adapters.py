"""LoRA: starts as the model itself, trains alone, merges to the same function, survives a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from isoray.errors import UserError
from isoray.models.adapters import add_adapter, merged, trainable_parameters
from isoray.models.config import AdapterConfig, CreateConfig, LoadOptions, ModelConfig, TokenizerConfig
from isoray.models.load import load, prepare, save

IDS = torch.tensor([[5, 6, 7, 8]])
LORA = LoadOptions(adapter=AdapterConfig(r=2))


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = TokenizerConfig(vocab_size=512)
    create = CreateConfig(architecture=request.param, hidden_size=32, layers=2, context=32, tokenizer=tokenizer)
    return prepare(ModelConfig(create=create), tmp_path_factory.mktemp("m") / request.param, ["some text"], seed=0)


def logits(model: torch.nn.Module) -> torch.Tensor:
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **extra).logits


def trained(folder: Path) -> PeftModel:
    model = load(folder, LORA, seed=1).model
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    assert isinstance(model, PeftModel)
    return model


def test_a_new_adapter_changes_nothing_and_hangs_on_the_seed(folder: Path) -> None:
    plain = load(folder).model
    one, same, other = (load(folder, LORA, seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(logits(one), logits(plain))
    first, again, different = (trainable_parameters(model) for model in (one, same, other))
    assert first and all("lora_" in name for name in first)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], different[name]) for name in first)


def test_merging_keeps_the_function_and_the_adapted_model(folder: Path) -> None:
    model = trained(folder)
    before = logits(model)
    whole = merged(model)
    assert not any("lora" in name for name, _ in whole.named_parameters())
    torch.testing.assert_close(logits(whole), before, rtol=1e-3, atol=1e-4)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(load(folder).model), before, atol=1e-2), "the adapter does nothing"


def test_saving_merged_and_alone(folder: Path, tmp_path: Path) -> None:
    model = trained(folder)
    tokenizer = load(folder).tokenizer
    save(model, tokenizer, tmp_path / "whole")
    torch.testing.assert_close(logits(load(tmp_path / "whole").model), logits(model), rtol=1e-3, atol=1e-4)
    save(model, tokenizer, tmp_path / "alone", merge=False)
    alone = load(prepare(ModelConfig(path=str(tmp_path / "alone")), tmp_path / "unused", None, seed=0))
    assert torch.equal(logits(alone.model), logits(model))
    assert set(trainable_parameters(alone.model)) == set(trainable_parameters(model))
    size = sum(path.stat().st_size for path in (tmp_path / "alone").glob("*.safetensors"))
    assert size < sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors"))


def test_targets(folder: Path) -> None:
    model = load(folder).model
    name = {"llama": "q_proj", "gpt2": "c_attn", "t5": "q"}[model.config.model_type]
    adapted = add_adapter(model, AdapterConfig(targets=(name,)), seed=0)
    assert all(f".{name}." in parameter for parameter in trainable_parameters(adapted))
    with pytest.raises(UserError, match=r"no module is called 'k_prj'"):
        add_adapter(load(folder).model, AdapterConfig(targets=("k_prj",)), seed=0)
