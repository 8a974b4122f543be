"""Which jobs an attribution run consists of, and where their vectors lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isoray.attribution.config import (
    BaselinesConfig,
    SampleConfig,
    TruthConfig,
    UnTracConfig,
    UnTracInvConfig,
    VariantConfig,
)
from isoray.attribution.jobs import DominantEigenpairs, Evaluate, Gradient, InverseProducts, Retrain, Unlearn
from isoray.config.base import Component
from isoray.corpora.store import BlockStore
from isoray.training.config import TrainingConfig
from isoray.training.lane_jobs import Job


@dataclass(frozen=True)
class Plan:
    """Everything the jobs of a run follow from."""

    train: Sequence[BlockStore]
    test: Sequence[BlockStore]
    seed: int
    sample: SampleConfig
    truth: TruthConfig | None
    untrac: UnTracConfig | None
    untrac_inv: UnTracInvConfig | None
    variants: Mapping[str, VariantConfig]
    baselines: BaselinesConfig
    training: TrainingConfig | None
    objective: Component.Config
    steps: int
    """Optimizer steps of the full training."""
    milestones: Sequence[int]
    """Steps of the full training at which weights were kept, the last one excepted."""
    scratch: Path
    """Folder for vectors and for the checkpoints of retrainings."""

    @property
    def seeds(self) -> range:
        """The estimators' data seeds."""
        return range(self.seed, self.seed + self.sample.seeds)

    @property
    def unlearnings(self) -> list[tuple[str, TrainingConfig, bool]]:
        """Every setting of unlearning: the estimator's name, the setting, whether test sets are unlearnt.

        A variant's estimator is called ``untrac.<variant>`` or ``untrac_inv.<variant>``.
        """
        named: list[tuple[str, TrainingConfig | None, bool]] = [
            ("untrac", self.untrac, False),
            ("untrac_inv", self.untrac_inv, True),
        ]
        for name, variant in self.variants.items():
            named += [(f"untrac.{name}", variant.untrac, False), (f"untrac_inv.{name}", variant.untrac_inv, True)]
        return [(estimator, settings, inverse) for estimator, settings, inverse in named if settings is not None]

    @property
    def starts(self) -> list[str]:
        """Names of the weights at which TracIn takes gradients, in order; the last is the trained model."""
        return [*(milestone(step) for step in self.milestones), "trained"]

    def vector(self, kind: str, start: str, of: str, seed: int) -> Path:
        """Where the vector of one set lies; ``kind`` is train, test or inverse."""
        return self.scratch / "vectors" / f"{kind}-{start}-{of}-{seed}.npy"

    def eigenpairs(self, seed: int) -> Path:
        """Where Arnoldi's eigenpairs lie."""
        return self.scratch / "vectors" / f"eigenpairs-{seed}"


def milestone(step: int) -> str:
    """The name, as a start, of the full training's weights after ``step`` steps."""
    return f"step-{step:08d}"


def count_jobs(plan_of: BaselinesConfig, *, corpora: int, tests: int) -> int:
    """A lower bound of the number of jobs, known before any data is read: for the number of lanes."""
    return max(corpora, tests) + (corpora if plan_of.gradient is not None else 0)


def training_jobs(plan: Plan) -> Iterator[Job]:
    """Losses of the trained model, and leave-one-out retrainings."""
    yield Evaluate("trained")
    if plan.truth is None or plan.training is None:
        return
    for repeat in range(plan.truth.repeats):
        # The first repetition's full training is the trained model itself.
        for exclude in [*([""] if repeat else []), *(store.name for store in plan.train)]:
            yield Retrain(
                exclude=exclude,
                objective=plan.objective,
                training=plan.training,
                steps=plan.steps,
                seed=plan.seed + repeat,
                scratch=plan.scratch / "checkpoints",
                repeat=repeat,
            )


def unlearning_jobs(plan: Plan) -> Iterator[Job]:
    """UnTrac, UnTrac-Inv and their variants, for every data seed."""
    for seed in plan.seeds:
        for estimator, settings, inverse in plan.unlearnings:
            forgotten, watched = (plan.test, plan.train) if inverse else (plan.train, plan.test)
            for store in forgotten:
                yield Unlearn(
                    estimator=estimator,
                    forget=store.name,
                    inverse=inverse,
                    training=settings,
                    seed=seed,
                    most=plan.sample.blocks,
                    cost=_unlearning_cost(plan, settings, store, watched),
                )


def _unlearning_cost(plan: Plan, settings: TrainingConfig, forget: BlockStore, watched: Sequence[BlockStore]) -> float:
    """In tokens of a forward pass; a backward pass is two of them."""
    blocks, tokens = _seen(plan, forget)
    steps_per_epoch = -(-blocks // min(settings.batch_size, blocks))
    steps = settings.total_steps(steps_per_epoch)
    evaluations = -(-steps // settings.evaluate_every) if settings.evaluate_every is not None else 1
    return 3 * tokens * steps / steps_per_epoch + evaluations * sum(_seen(plan, store)[1] for store in watched)


def _seen(plan: Plan, store: BlockStore) -> tuple[int, float]:
    """How many blocks, and about how many tokens, of a corpus the estimators see."""
    if plan.sample.blocks is None or any(store is test for test in plan.test):
        return len(store), float(store.manifest.tokens)
    blocks = min(plan.sample.blocks, len(store))
    return blocks, store.manifest.tokens * blocks / len(store)


def gradient_jobs(plan: Plan) -> Iterator[Job]:
    """Gradients of all sets; they come before the Hessian jobs, which read those of the test sets."""
    baselines = plan.baselines
    wanted = [config for config in (baselines.gradient, baselines.tracin, baselines.lissa, baselines.arnoldi) if config]
    if not wanted:
        return
    rows = min(config.micro_batch for config in wanted)
    starts = plan.starts if baselines.tracin is not None else ["trained"]
    for start in starts:
        for seed in plan.seeds:
            for store in plan.train:
                path = plan.vector("train", start, store.name, seed)
                yield Gradient(store.name, "train", start, seed, plan.sample.blocks, rows, path, _seen(plan, store)[1])
        for store in plan.test:
            path = plan.vector("test", start, store.name, plan.seed)
            yield Gradient(store.name, "test", start, plan.seed, None, rows, path, _seen(plan, store)[1])


def hessian_jobs(plan: Plan) -> Iterator[Job]:
    """LiSSA and Arnoldi, for every data seed."""
    tests = [store.name for store in plan.test]
    for seed in plan.seeds:
        if plan.baselines.lissa is not None:
            yield InverseProducts(
                plan.baselines.lissa,
                seed,
                gradients={test: plan.vector("test", "trained", test, plan.seed) for test in tests},
                paths={test: plan.vector("inverse", "trained", test, seed) for test in tests},
            )
        if plan.baselines.arnoldi is not None:
            yield DominantEigenpairs(plan.baselines.arnoldi, seed, folder=plan.eigenpairs(seed))
