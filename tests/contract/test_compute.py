"""How a model is computed changes speed and memory, and no result beyond rounding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import ragged
from torch import Tensor, nn

from isoray.corpora.stream import BlockStream
from isoray.objectives.lm import LanguageModelling
from isoray.training.config import ComputeConfig, TrainingConfig
from isoray.training.loop import train
from isoray.training.optim import SgdConfig
from isoray.training.parallel import Parallel, transformer_blocks

ROWS = 8


def one_step(model: nn.Module, **compute: Any) -> tuple[Tensor, float]:
    """Flat gradient and loss of a full-batch step, the gradient read off an SGD update with learning rate 1."""
    before = [p.detach().clone() for p in model.parameters()]
    stream = BlockStream([ragged("a", ROWS, seed=1)], batch_size=ROWS, seed=0)
    config = TrainingConfig(steps=1, batch_size=ROWS, optimizer=SgdConfig(lr=1.0))
    parallel = Parallel(model, compute=ComputeConfig(micro_batch_rows=ROWS, **compute))
    objective = LanguageModelling(LanguageModelling.Config())
    (step,) = train(parallel, objective, {"train": stream}, config, seed=0, pad_token_id=0)
    assert step.loss is not None
    moved = [(old - new.detach()).flatten() for old, new in zip(before, model.parameters(), strict=True)]
    return torch.cat(moved), step.loss


def test_activation_checkpointing_computes_blocks_again_and_changes_nothing(
    tiny_model: Callable[..., nn.Module],
) -> None:
    runs = []
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(dtype=torch.float64)
        passes: list[str] = []
        inner = transformer_blocks(model)[0].mlp
        inner.register_forward_pre_hook(lambda *_, passes=passes: passes.append("pass"))
        gradients.append(one_step(model, activation_checkpointing=checkpointing)[0])
        runs.append(len(passes))
    assert runs[1] == 2 * runs[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-14)


def test_bf16_is_used_in_the_forward_pass_alone(tiny_model: Callable[..., nn.Module]) -> None:
    types: set[torch.dtype] = set()
    model = tiny_model()
    transformer_blocks(model)[0].mlp.down_proj.register_forward_hook(lambda _, __, out: types.add(out.dtype))
    gradient, loss = one_step(model, precision="bf16")
    exact_gradient, exact_loss = one_step(tiny_model())
    assert types == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert loss != exact_loss
    assert loss == pytest.approx(exact_loss, rel=1e-2)
    assert torch.cosine_similarity(gradient, exact_gradient, dim=0) > 0.999


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: apt install g++")
@pytest.mark.timeout(300)
def test_compiled_blocks_compute_the_same(tiny_model: Callable[..., nn.Module]) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    gradient, loss = one_step(tiny_model(), compile=True)
    exact_gradient, exact_loss = one_step(tiny_model())
    assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-3, atol=1e-5)
