"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from isoray.config.base import Config

Lr = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class _Adam(Config):
    lr: Lr = 5e-5
    """Learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay: decoupled in `adamw`, an L2 term in `adam`; with 0 the two are the same."""


class AdamConfig(_Adam):
    """Adam (Kingma and Ba, 2015); UnTrac's default with lr 5e-5."""

    kind: Literal["adam"] = "adam"
    """Adam."""


class AdamWConfig(_Adam):
    """AdamW (Loshchilov and Hutter, 2019)."""

    kind: Literal["adamw"] = "adamw"
    """AdamW."""


class SgdConfig(Config):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = "sgd"
    """SGD, with momentum where `momentum` is above 0."""
    lr: Lr = 5e-5
    """Learning rate."""
    momentum: Beta = 0.0
    """Momentum; the study of UnTrac uses 0.9."""
    dampening: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Dampening of the momentum; the study of UnTrac uses 0.9."""


class RmsPropConfig(Config):
    """RMSProp."""

    kind: Literal["rmsprop"] = "rmsprop"
    """RMSProp."""
    lr: Lr = 5e-5
    """Learning rate."""
    alpha: Beta = 0.99
    """Decay rate of the squared gradient."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the squared gradient."""


class AdafactorConfig(Config):
    """Adafactor (Shazeer and Stern, 2018) with a given learning rate, neither relative steps nor parameter scaling."""

    kind: Literal["adafactor"] = "adafactor"
    """Adafactor."""
    lr: Lr = 5e-5
    """Learning rate."""


OptimizerConfig = Annotated[
    AdamConfig | AdamWConfig | SgdConfig | RmsPropConfig | AdafactorConfig, Field(discriminator="kind")
]


class ScheduleConfig(Config):
    """Learning-rate schedule: linear warm-up, then constant, linear or cosine decay."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Factor of the learning rate at the last step, for `linear` and `cosine`."""

    def factor(self, step: int, total: int) -> float:
        """The factor of the learning rate at optimizer step ``step`` of ``total`` (from 0)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        remaining = 1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.final + (1 - self.final) * remaining


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """A new optimizer over the trainable parameters; fused kernels where PyTorch has them."""
    trainable = [p for p in parameters if p.requires_grad]
    # Fused kernels exist for the float types of dense tensors; FSDP's DTensors take the foreach path.
    plain = all(type(p.data) is torch.Tensor for p in trainable)
    match config:
        case AdamConfig() | AdamWConfig():
            kind = torch.optim.AdamW if isinstance(config, AdamWConfig) else torch.optim.Adam
            return kind(
                trainable,
                lr=config.lr,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=plain,
            )
        case SgdConfig():
            return torch.optim.SGD(
                trainable, lr=config.lr, momentum=config.momentum, dampening=config.dampening, fused=plain
            )
        case RmsPropConfig():
            return torch.optim.RMSprop(trainable, lr=config.lr, alpha=config.alpha, eps=config.eps)
        case AdafactorConfig():
            from transformers.optimization import Adafactor as HfAdafactor  # takes seconds to import

            return HfAdafactor(  # type: ignore[no-untyped-call]
                trainable, lr=config.lr, scale_parameter=False, relative_step=False, warmup_init=False
            )


class EarlyUpdates:
    """Updates weights while the backward pass still runs, so that their gradients need not exist all at once.

    Gradients are used up and dropped in portions of ``portion`` bytes, in the order in which they become ready; small
    portions make steps slower, as what they free is seldom what the next gradients need. The optimizers here treat
    every parameter by itself, so the weights are, bit for bit, those of an update at the end. PyTorch refuses a
    backward pass that still needs a weight which was changed.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], *, portion: int = 128 * 2**20) -> None:
        self._optimizer, self._parameters, self._portion = optimizer, parameters, portion
        self.worthwhile = 2 * portion <= sum(p.nbytes for p in parameters)
        """Whether there is more than a portion or two to save."""

    @contextmanager
    def during_backward(self, *, measure: bool) -> Iterator[list[Tensor]]:
        """Run one backward pass inside; where ``measure``, the list then holds the 2-norms of all gradients."""
        ready: list[nn.Parameter] = []
        norms: dict[nn.Parameter, Tensor] = {}
        found: list[Tensor] = []

        def update() -> None:
            gradients = [p.grad for p in ready if p.grad is not None]
            if measure and gradients:
                norms.update(zip(ready, torch._foreach_norm(gradients), strict=True))
            self._optimizer.step()  # of those that have a gradient
            for parameter in ready:
                parameter.grad = None
            ready.clear()

        def take(parameter: nn.Parameter) -> None:
            ready.append(parameter)
            if sum(p.nbytes for p in ready) >= self._portion:
                update()

        hooks = [p.register_post_accumulate_grad_hook(take) for p in self._parameters]  # type: ignore[no-untyped-call]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()
        update()
        found += [norms[p] for p in self._parameters if p in norms]


def combined_norm(norms: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients from the 2-norms of each: a scalar, 0 where there are none."""
    return torch.linalg.vector_norm(torch.stack(list(norms))) if norms else torch.zeros(())
