"""Ranks and how a model is spread over them: one process, DDP, or FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from isoray.training.config import ComputeConfig
from isoray.training.memory import keep_freed_memory

CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among the workers of one training; a process group exists when ``world`` is above 1."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @classmethod
    def current(cls, device: torch.device | None = None) -> Ranks:
        """From the initialised default process group, or a single rank."""
        if not dist.is_initialized():
            return cls(device=device or CPU)
        return cls(dist.get_rank(), dist.get_world_size(), device or CPU)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def deal(self, parts: Sequence[T]) -> tuple[Sequence[T], int]:
        """This rank's share of ``parts``, dealt in turn, and how many it has fewer than the first rank.

        A pass through the model may be a collective operation: then all ranks must make as many.
        """
        mine = parts[self.rank :: self.world]
        return mine, -(-len(parts) // self.world) - len(mine)

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.world > 1:
            dist.barrier()


class _Inside(nn.Module):
    """Runs a function of the model inside a module's forward, so that DDP's and FSDP's hooks see it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


class Parallel:
    """A model on this rank's device, spread over the ranks. Made once per model, for any number of trainings."""

    def __init__(self, model: nn.Module, ranks: Ranks | None = None, compute: ComputeConfig | None = None) -> None:
        self.model = model
        self.ranks = ranks or Ranks.current()
        self.compute = compute or ComputeConfig()
        self.sharded = self.ranks.world > 1 and self.compute.parallel == "fsdp"
        """Whether every forward pass is a collective operation."""
        if self.ranks.device.type == "cpu":
            keep_freed_memory()
        self._inside: nn.Module = _Inside(model.to(self.ranks.device))
        if self.compute.activation_checkpointing:
            hf_model: Any = model
            hf_model.gradient_checkpointing_enable({"use_reentrant": False})
            hf_model.enable_input_require_grads()  # with frozen embeddings (LoRA) nothing would train without it
        if self.compute.compile:
            for block in transformer_blocks(model):
                block.compile()
        if self.sharded:
            policy = (
                MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
                if self.compute.precision == "bf16"
                else MixedPrecisionPolicy()
            )
            for block in transformer_blocks(model):
                fully_shard(block, mp_policy=policy)
            fully_shard(self._inside, mp_policy=policy)
        elif self.ranks.world > 1:
            # The objective's sums are divided by global counts, so every rank must hold the same starting weights and
            # nothing else is broadcast: buffers (rotary tables, masks) are constants.
            self._inside = DistributedDataParallel(self._inside, broadcast_buffers=False, gradient_as_bucket_view=True)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(model, *args)`` with gradient hooks and autocast."""
        with self._autocast():
            return self._inside(function, *args)

    @torch.no_grad()
    def evaluate(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(model, *args)`` without gradients, in evaluation mode (dropout off)."""
        was_training = self.model.training
        self.model.eval()
        try:
            with self._autocast():
                if self.sharded:
                    return self._inside(function, *args)
                return function(self.model, *args)
        finally:
            self.model.train(was_training)

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Gradients are averaged over the ranks only in the last micro-batch of a step."""
        inside = self._inside
        if isinstance(inside, DistributedDataParallel) and not last:
            with inside.no_sync():
                yield
            return
        if self.sharded:
            cast("Any", inside).set_requires_gradient_sync(last)
        yield

    @staticmethod
    def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
        """The 2-norm of the whole gradient: a scalar. Reads every gradient once, so not for every step."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @staticmethod
    def clip(parameters: list[nn.Parameter], limit: float, norm: Tensor) -> None:
        """Scale the gradients in place so that their norm is at most ``limit``."""
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.compute.precision == "bf16":
            return torch.autocast(self.ranks.device.type, torch.bfloat16)
        return nullcontext()


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a Transformers model (its ``_no_split_modules``), outermost first."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
