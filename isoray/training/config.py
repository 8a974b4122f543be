"""Settings of a training, and of how the model is computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from isoray.config.base import Config
from isoray.training.optim import AdamConfig, OptimizerConfig, ScheduleConfig
from isoray.training.privacy import PrivacyConfig


class ComputeConfig(Config):
    """How the model is computed. Speed and memory only: beyond rounding, no result depends on it (but on bf16)."""

    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    """Most padded tokens of one forward and backward pass of one worker; a larger batch is accumulated. `auto`: 1024 on
    a CPU, where the activations of more leave the caches and fill the memory; 4096 on a GPU."""
    micro_batch_rows: PositiveInt | None = None
    """Most rows of one pass of one worker, where memory per row matters more than per token."""
    evaluation_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    """Most padded tokens of one pass without gradients. `auto`: 1024 on a CPU, 16384 on a GPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: autocast of the forward pass, weights and optimizer stay as they are (needs bf16 units to be fast)."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several workers: replicate the model (`ddp`) or shard it (`fsdp`, FSDP2)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """`torch.compile` of the transformer blocks."""

    def training_tokens(self, device: str) -> int:
        """``micro_batch_tokens`` on a device of that type (``cpu``, ``cuda``)."""
        if self.micro_batch_tokens == "auto":
            return 1024 if device == "cpu" else 4096
        return self.micro_batch_tokens

    def evaluation_tokens(self, device: str) -> int:
        """``evaluation_batch_tokens`` on a device of that type."""
        if self.evaluation_batch_tokens == "auto":
            return 1024 if device == "cpu" else 16384
        return self.evaluation_batch_tokens


class TrainingConfig(Config):
    """How a model is trained: length, batches, optimizer, what is measured on the way."""

    steps: PositiveInt | None = None
    """Optimizer steps; give this or `epochs`."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data; give this or `steps`."""
    batch_size: PositiveInt = 8
    """Blocks (rows) per optimizer step, over all workers."""
    optimizer: OptimizerConfig = AdamConfig()
    """The optimizer and its learning rate."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning-rate schedule."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Clip the norm of the whole gradient; none = no clipping."""
    privacy: PrivacyConfig | None = None
    """Train with differential privacy (DP-SGD), for which every example's gradient is clipped by itself and noise is
    added; none = not private."""
    evaluate_every: PositiveInt | None = None
    """Evaluate the named sets every so many steps, and at the end; none = only at the end."""
    checkpoint_every: PositiveInt | None = None
    """Write a resumable checkpoint every so many steps; none = none."""
    keep_checkpoints: PositiveInt = 1
    """Complete checkpoints kept."""
    log_every: PositiveInt = 10
    """Report loss, gradient norm and throughput every so many steps."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`, and set the other to null")
        return self

    @model_validator(mode="after")
    def _one_clipping(self) -> TrainingConfig:
        if self.clip_norm is not None and self.privacy is not None:
            raise ValueError(
                "`clip_norm` clips the gradient of the whole batch, `privacy.clip_norm` that of each example: with "
                "`privacy`, set `clip_norm` to null"
            )
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole training, at least 1."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * steps_per_epoch))
