"""Settings of UnTrac, of the truth and of the baselines; the defaults are those of Isonuma & Titov (ACL 2024)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from isoray.config.base import Config
from isoray.training.config import TrainingConfig


class TruthConfig(Config):
    """Leave-one-out ground truth: the same training, for the same number of steps, without one corpus."""

    repeats: PositiveInt = 1
    """Trainings per corpus, each with another order of the data; the truth is their mean (paper: 1)."""


class UnTracConfig(TrainingConfig):
    """How a corpus is unlearnt: gradient ascent; the defaults are the paper's."""

    epochs: float | None = Field(default=1.0, gt=0)
    """Passes over the corpus's sample; give this or `steps`."""
    batch_size: PositiveInt = 1
    """Blocks per step."""


class UnTracInvConfig(TrainingConfig):
    """How a test set is unlearnt: gradient ascent; the defaults are the paper's."""

    steps: PositiveInt | None = 5
    """Optimizer steps; give this or `epochs`."""
    batch_size: PositiveInt = 256
    """Blocks per step, at most the whole test set."""


class VariantConfig(Config):
    """Further settings of UnTrac and UnTrac-Inv in the same run, for studies; each starts from the run's own."""

    untrac: UnTracConfig | None = None
    """Unlearn each training corpus also like this."""
    untrac_inv: UnTracInvConfig | None = None
    """Unlearn each test set also like this."""


class SampleConfig(Config):
    """Which part of the training corpora the estimators see."""

    seeds: PositiveInt = 1
    """Repetitions of every estimator, each on another sample in another order; their spread is reported (paper: 4)."""
    blocks: PositiveInt | None = 10_000
    """Blocks drawn from each training corpus; none: all of them (paper: 10,000)."""


class GradientConfig(Config):
    """GradDot and GradCos: both are read off one summed gradient per set, at the model under study."""

    micro_batch: int = Field(default=8, ge=1)
    """Examples per forward and backward pass. Memory and speed only: the sums do not depend on it."""


class TracInConfig(Config):
    """TracIn: gradients at several training checkpoints."""

    micro_batch: int = Field(default=8, ge=1)
    """Examples per forward and backward pass. Memory and speed only: the sums do not depend on it."""

    checkpoint_every: int = Field(default=128, ge=1)
    """Steps of the full training between two checkpoints (paper: 128 synthetic, 10,000 pretraining)."""

    normalise_train: bool = True
    """Divide each training gradient by its norm at every checkpoint, as the published code does; the paper's formula
    does not."""

    learning_rates: Literal["none", "schedule"] = "none"
    """`none` weighs the checkpoints equally, as the published code does; `schedule` by the learning rate at each of
    them, as the paper's formula does."""


class HessianConfig(Config):
    """What the two influence functions share: the Hessian of the mean training loss over a sample of examples."""

    micro_batch: int = Field(default=4, ge=1)
    """Examples per double backward pass. Memory and speed only: the products do not depend on it."""

    examples: int = Field(default=256, ge=1)
    """Training examples whose mean loss the Hessian is taken of (paper: 256 per product)."""


class LissaConfig(HessianConfig):
    """Influence function with the inverse Hessian of LiSSA, a truncated Neumann series."""

    iterations: int = Field(default=10, ge=1)
    """Hessian-vector products per test set."""

    step_size: float | None = Field(default=None, gt=0)
    """The series' step alpha; it shrinks only the directions of positive curvature below 2 / alpha. Empty: one over the
    largest |eigenvalue| plus damping, found by power iteration (the paper does not say how it chose)."""

    power_iterations: int = Field(default=20, ge=1)
    """Hessian-vector products spent once on the largest |eigenvalue| where `step_size` is empty."""

    damping: float = Field(default=0.0, ge=0)
    """Added to the Hessian's diagonal. Above zero deviates from the paper; it tames negative curvature."""

    normalise_train: bool = False
    """Divide each training gradient by its norm. True deviates from the paper, which does so for Arnoldi only."""


class ArnoldiConfig(HessianConfig):
    """Influence function with the Hessian's dominant eigenpairs, found by Arnoldi iteration."""

    dimension: int = Field(default=25, ge=1)
    """Dimension n of the Krylov space, and Hessian-vector products in all (paper: 25 synthetic, 200 pretraining).
    The basis takes n times the size of the trainable parameters on disk."""

    eigenpairs: int = Field(default=25, ge=1)
    """Eigenpairs p kept, by largest |eigenvalue| (paper: 25 synthetic, 100 pretraining)."""

    normalise_train: bool = True
    """Divide each training gradient by its norm, as the paper does."""

    @model_validator(mode="after")
    def _kept_of_found(self) -> ArnoldiConfig:
        if self.eigenpairs > self.dimension:
            raise ValueError(
                f"eigenpairs ({self.eigenpairs}) exceeds dimension ({self.dimension}): a Krylov space of dimension n "
                "holds n eigenpairs; lower `eigenpairs` or raise `dimension`"
            )
        return self


class BaselinesConfig(Config):
    """The estimators UnTrac is compared with; null leaves one out."""

    gradient: GradientConfig | None = None
    """GradDot and GradCos."""
    tracin: TracInConfig | None = None
    """TracIn, over checkpoints of the full training."""
    lissa: LissaConfig | None = None
    """Hessian-based influence by LiSSA."""
    arnoldi: ArnoldiConfig | None = None
    """Hessian-based influence by Arnoldi iteration."""
