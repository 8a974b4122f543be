"""Settings of a training, and of how the model is computed."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from isoray.config.base import Config
from isoray.training.epsilon import Accountant
from isoray.training.optim import AdamConfig, OptimizerConfig, ScheduleConfig


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


class PrivacyConfig(Config):
    """Differentially private training (DP-SGD; Abadi et al., 2016).

    The unit of privacy is one example, and every block counts as one: corpora must be built with `packing: false`.
    One worker, the objective `lm` with `average: example`, precision fp32.
    """

    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient of each example is scaled down to at most this norm."""
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of the noise on the sum of a step's gradients, in units of `clip_norm`; give this or
    `epsilon`."""
    epsilon: Annotated[float, Field(gt=0)] | None = None
    """What the whole training may spend, at `delta`: the noise is chosen to stay within 0.01 below it; give this or
    `noise_multiplier`."""
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Probability with which the guarantee may fail; none = 1 / number of examples. Should not be above that."""
    accountant: Accountant = "rdp"
    """How epsilon is computed; the training itself is the same. `rdp` (Rényi) is an upper bound that is quick and
    never fails, hence the default, as every report asks for it. `prv` (Gopi et al., 2021) is a tighter one, most of all
    for few steps, but takes gigabytes where epsilon is very large: it is refused there. `gdp` is an approximation that
    can be too small, for comparison with older work only."""
    clipping: Literal["per_sample", "ghost"] = "per_sample"
    """How gradients are clipped, with the same result. `per_sample` holds the gradient of every row of a micro-batch
    at once (suits adapters; bound it by `compute.micro_batch_rows`); `ghost` holds one in all and makes two backward
    passes (suits full fine-tuning)."""
    secure: bool = False
    """Draw batches and noise from the operating system's randomness. Otherwise both hang on the run's seed, so that the
    training can be repeated and resumed to the last bit; but then the guarantee holds only against those who do not
    know the seed: where the model is given away, keep a secret one, or set this and give up exact repetition."""

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError("give exactly one of `noise_multiplier` and `epsilon`, and set the other to null")
        return self


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
