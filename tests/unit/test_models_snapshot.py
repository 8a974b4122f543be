"""Snapshots: exact, in place, without memory of their own where the files hold the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isoray.models.config import AdapterConfig, CreateConfig, LoadOptions, ModelConfig, TokenizerConfig
from isoray.models.load import load, prepare
from isoray.models.snapshot import Snapshot


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = TokenizerConfig(vocab_size=512)
    create = CreateConfig(architecture=request.param, hidden_size=32, layers=2, context=32, tokenizer=tokenizer)
    return prepare(ModelConfig(create=create), tmp_path_factory.mktemp("m") / request.param, ["some text"], seed=0)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


@torch.no_grad()
def disturb(model: torch.nn.Module) -> None:
    for tensor in model.parameters():
        if tensor.requires_grad:
            tensor.add_(1)
            tensor.grad = torch.ones_like(tensor)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(1)


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"adapter": AdapterConfig()}], ids=["fp32", "bf16", "lora"])
@pytest.mark.parametrize("mapped", [False, True])
def test_restoring_is_exact_and_in_place(folder: Path, options: dict[str, Any], mapped: bool) -> None:
    model = load(folder, LoadOptions(**options)).model
    snapshot = Snapshot(model, folder if mapped else None)
    before, where = state(model), [parameter.data_ptr() for parameter in model.parameters()]
    for _ in range(2):
        disturb(model)
        snapshot.restore(model)
        now = state(model)
        assert all(torch.equal(before[name], now[name]) for name in before)
        assert [parameter.data_ptr() for parameter in model.parameters()] == where
        assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_of_the_folder_take_no_memory_and_tied_ones_count_once(folder: Path) -> None:
    model = load(folder).model
    everything = sum(parameter.nbytes for parameter in model.parameters())
    assert Snapshot(model).cloned_bytes >= everything
    snapshot = Snapshot(model, folder)
    assert snapshot.mapped_bytes == everything
    assert snapshot.cloned_bytes == sum(buffer.nbytes for buffer in model.buffers())


def test_what_differs_from_the_folder_is_cloned(folder: Path) -> None:
    model = load(folder).model
    name, changed = next((n, p) for n, p in model.named_parameters() if p.dim() == 1)
    with torch.no_grad():
        changed[0] += 1e-3
    snapshot = Snapshot(model, folder)
    assert snapshot.cloned_bytes >= changed.nbytes
    value = changed.detach().clone()
    disturb(model)
    snapshot.restore(model)
    assert torch.equal(model.get_parameter(name), value)


def test_training_does_not_write_to_the_files(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    model = load(folder).model
    snapshot = Snapshot(model, folder)
    disturb(model)
    assert (folder / "model.safetensors").read_bytes() == content
    other = load(folder).model
    snapshot.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
