"""Updating weights during the backward pass changes nothing but the memory that gradients take."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from blocks import ragged
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from isoray.corpora.stream import BlockStream
from isoray.objectives.gradient_ascent import GradientAscent
from isoray.training import loop
from isoray.training.config import ComputeConfig, TrainingConfig
from isoray.training.loop import train
from isoray.training.optim import (
    AdafactorConfig,
    AdamConfig,
    AdamWConfig,
    EarlyUpdates,
    OptimizerConfig,
    RmsPropConfig,
    SgdConfig,
)
from isoray.training.parallel import Parallel

STORE = ragged("a", 12, seed=3)


def trained(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, *, portion: int, batch_size: int = 1, **settings: object
) -> tuple[list[tuple[float | None, float | None]], Tensor, int]:
    """Reports and weights after six steps, and how often the optimizer was called."""
    calls = 0

    def early(*args: object) -> EarlyUpdates:
        return EarlyUpdates(*args, portion=portion)  # type: ignore[arg-type]

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    monkeypatch.setattr(loop, "EarlyUpdates", early)
    config = TrainingConfig(steps=6, batch_size=batch_size, log_every=2, **settings)  # type: ignore[arg-type]
    streams = {"train": BlockStream([STORE], batch_size=batch_size, seed=0)}
    hook = register_optimizer_step_post_hook(count)
    try:
        parallel = Parallel(model, compute=ComputeConfig(micro_batch_rows=1))
        objective = GradientAscent(GradientAscent.Config())
        steps = list(train(parallel, objective, streams, config, seed=0, pad_token_id=0))
    finally:
        hook.remove()
    assert all(p.grad is None for p in model.parameters())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return [(step.loss, step.gradient_norm) for step in steps], weights, calls


@pytest.mark.parametrize(
    "optimizer",
    [
        AdamConfig(lr=1e-3),
        AdamWConfig(lr=1e-3, weight_decay=0.1),
        SgdConfig(lr=0.1, momentum=0.9),
        RmsPropConfig(),
        AdafactorConfig(),
    ],
    ids=lambda config: config.kind,
)
def test_early_updates_give_the_same_bits(
    optimizer: OptimizerConfig, tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tiny_model(), monkeypatch, portion=10**9, optimizer=optimizer)
    early = trained(tiny_model(), monkeypatch, portion=2000, optimizer=optimizer)
    assert early[0] == whole[0]
    assert torch.equal(early[1], whole[1])
    assert early[2] > 2 * whole[2] == 12, "the update was not cut into portions"


@pytest.mark.parametrize("settings", [{"clip_norm": 0.5}, {"batch_size": 2}], ids=["clipping", "accumulation"])
def test_gradients_stay_whole_where_they_are_needed(
    settings: dict[str, float], tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, calls = trained(tiny_model(), monkeypatch, portion=2000, **settings)  # type: ignore[arg-type]
    assert calls == 6


def test_the_norm_is_that_of_the_whole_gradient(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model(dtype=torch.float64)
    parameters = list(model.parameters())
    ids = torch.arange(8)[None]

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    loss().backward()
    want = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
    model.zero_grad()
    early = EarlyUpdates(torch.optim.SGD(parameters, lr=0.1), parameters, portion=2000)
    with early.during_backward(measure=True) as norms:
        loss().backward()
    assert math.hypot(*map(float, norms)) == pytest.approx(want, rel=1e-12)
