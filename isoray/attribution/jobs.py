"""The short jobs that corpus attribution is made of; each runs on a :class:`Workbench` and returns numbers.

Results hold losses as ``{set: mean loss in nats}``. Vectors go to files, for scoring on the driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from isoray.attribution.arnoldi import save_eigenpairs
from isoray.attribution.config import ArnoldiConfig, HessianConfig, LissaConfig
from isoray.attribution.gradient import LossSums, summed_gradient
from isoray.attribution.hessian import MeanHessian
from isoray.attribution.lissa import choose_step_size, save_inverse_product
from isoray.attribution.vectors import save_vector
from isoray.attribution.workbench import Workbench
from isoray.config.base import Component, digest_of
from isoray.corpora.store import Blocks
from isoray.corpora.stream import BlockStream
from isoray.objectives.base import Objective
from isoray.objectives.gradient_ascent import GradientAscent
from isoray.objectives.reduce import Batch, example_nll_sum, label_counts, token_nll
from isoray.training.config import TrainingConfig
from isoray.training.fit import log_step, read_log
from isoray.training.loop import train
from isoray.training.state import Checkpoints


@runtime_checkable
class VectorJob(Protocol):
    """A job that leaves vectors on disk beside its result."""

    @property
    def key(self) -> str:
        """As of every job."""

    def written(self) -> bool:
        """Whether the vectors are there."""


def sample(blocks: Blocks, *, most: int | None, seed: int) -> Blocks:
    """At most ``most`` of ``blocks``, drawn by ``seed`` and the corpus's name; all, in order, if that suffices."""
    if most is None or len(blocks) <= most:
        return blocks
    draw = np.random.default_rng([seed, int(digest_of(blocks.name), 16)])
    chosen = np.sort(draw.choice(len(blocks), size=most, replace=False))
    return blocks.subset(chosen)  # type: ignore[attr-defined, no-any-return]


@dataclass(frozen=True)
class Evaluate:
    """Losses of the test sets at one start."""

    start: str
    cost: float = 1.0

    @property
    def key(self) -> str:
        return f"losses-{self.start}"

    def run(self, bench: Workbench) -> dict[str, Any]:
        """``{"losses": {test: loss}}``."""
        return {"losses": bench.losses_at(self.start, bench.test)}


@dataclass(frozen=True)
class Retrain:
    """Leave-one-out ground truth: train from the initial weights for the same number of steps, without one corpus."""

    exclude: str
    """The corpus to leave out; empty: none."""
    objective: Component.Config
    training: TrainingConfig
    steps: int
    seed: int
    scratch: Path = field(compare=False)
    """Folder for checkpoints."""
    repeat: int = 0

    @property
    def key(self) -> str:
        return f"without-{self.exclude}-{self.repeat}" if self.exclude else f"all-{self.repeat}"

    @property
    def cost(self) -> float:
        return float(self.steps * self.training.batch_size)

    def run(self, bench: Workbench) -> dict[str, Any]:
        """``{"losses": {test: loss}, "steps": [{"step", "loss", "learning_rate", ...}]}``."""
        parallel = bench.start("init")
        stream = BlockStream(
            list(bench.train.values()),
            batch_size=self.training.batch_size,
            seed=self.seed,
            exclude=[self.exclude] if self.exclude else [],
        )
        config = self.training.model_copy(update={"steps": self.steps, "epochs": None})
        settings = [config.model_dump(mode="json"), self.objective.model_dump(mode="json")]
        fingerprint = digest_of([bench.digest, stream.fingerprint, *settings])
        checkpoints = Checkpoints(self.scratch / self.key, fingerprint, keep=config.keep_checkpoints)
        # On disk, because a resumed training does not report the steps before its checkpoint again.
        log = self.scratch / f"{self.key}-{fingerprint}.jsonl"
        self.scratch.mkdir(parents=True, exist_ok=True)
        losses: Mapping[str, float] = {}
        for step in train(
            parallel,
            Objective.build(self.objective),
            {"train": stream},
            config,
            seed=self.seed,
            pad_token_id=bench.pad_token_id,
            layout=bench.layout,
            evaluator=bench.losses(bench.test),
            checkpoints=checkpoints,
        ):
            bench.progress(step.step / step.total)
            if bench.is_first:
                log_step(log, self.key, step)
            losses = step.evaluation if step.evaluation is not None else losses
        if not bench.is_first:
            return {}
        rows = [{name: row[name] for name in ("step", "loss", "learning_rate")} for row in read_log(log)]
        checkpoints.clear()
        log.unlink()
        return {"losses": dict(losses), "steps": rows}


@dataclass(frozen=True)
class Unlearn:
    """Gradient ascent on one set from the trained model, watching other sets: UnTrac and UnTrac-Inv.

    ``forget`` names the set that is unlearnt: a training corpus (then the test sets are watched: UnTrac) or a test set
    (then samples of the training corpora are watched: UnTrac-Inv). Isonuma & Titov (ACL 2024), section 3.
    """

    estimator: str
    """What the scores are filed under: ``untrac``, ``untrac_inv``, or a variant of one."""
    forget: str
    inverse: bool
    training: TrainingConfig
    seed: int
    most: int | None
    """Blocks sampled from each training corpus."""
    cost: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.estimator}-{self.seed}-{self.forget}"

    def run(self, bench: Workbench) -> dict[str, Any]:
        """``{"curve": [{"step", "losses": {set: loss}}]}``; the first entry is the trained model itself, step 0."""
        corpora = {name: sample(store, most=self.most, seed=self.seed) for name, store in bench.train.items()}
        watched: Mapping[str, Blocks] = corpora if self.inverse else bench.test
        forget = bench.test[self.forget] if self.inverse else corpora[self.forget]
        batch_size = min(self.training.batch_size, len(forget))
        curve: list[dict[str, Any]] = [{"step": 0, "losses": bench.losses_at("trained", watched)}]
        for step in train(
            bench.start("trained"),
            GradientAscent(GradientAscent.Config(average=bench.average)),
            {"train": BlockStream([forget], batch_size=batch_size, seed=self.seed)},
            self.training.model_copy(update={"batch_size": batch_size}),
            seed=self.seed,
            pad_token_id=bench.pad_token_id,
            layout=bench.layout,
            evaluator=bench.losses(watched),
        ):
            bench.progress(step.step / step.total)
            if step.evaluation is not None:
                curve.append({"step": step.step, "losses": dict(step.evaluation)})
        return {"curve": curve}


@dataclass(frozen=True)
class Gradient:
    """The gradient of one set's summed loss at one start, written to ``path``."""

    of: str
    role: Literal["train", "test"]
    start: str
    seed: int
    most: int | None
    """Blocks sampled from each training corpus."""
    rows: int
    """Examples per pass."""
    path: Path = field(compare=False)
    cost: float = 1.0

    @property
    def key(self) -> str:
        return f"gradient-{self.seed}-{self.start}-{self.role}-{self.of}"

    def written(self) -> bool:
        """Whether the gradient is on disk."""
        return self.path.exists()

    def run(self, bench: Workbench) -> dict[str, Any]:
        """``{"norm": the gradient's norm}``."""
        store = bench.test[self.of] if self.role == "test" else bench.train[self.of]
        examples = store if self.role == "test" else sample(store, most=self.most, seed=self.seed)
        model = bench.start(self.start).model
        batches = list(bench.batches(examples, rows=self.rows, share=True))
        gradient_P = bench.ranks.sum(summed_gradient(model, batches, loss_sums(bench, passes=len(batches))))
        if bench.is_first:
            save_vector(self.path, gradient_P.cpu().numpy())
        return {"norm": float(torch.linalg.vector_norm(gradient_P, dtype=torch.float64))}


@dataclass(frozen=True)
class InverseProducts:
    """LiSSA: the inverse-Hessian product of every test set's gradient, written to files."""

    config: LissaConfig
    seed: int
    gradients: Mapping[str, Path] = field(compare=False)
    """Test sets' gradients at the trained model."""
    paths: Mapping[str, Path] = field(compare=False)
    """Where their products go."""

    @property
    def key(self) -> str:
        return f"lissa-{self.seed}"

    @property
    def cost(self) -> float:
        return float(self._products * self.config.examples)

    @property
    def _products(self) -> int:
        searched = self.config.power_iterations if self.config.step_size is None else 0
        return searched + self.config.iterations * len(self.gradients)

    def written(self) -> bool:
        """Whether the products are on disk."""
        return all(path.exists() for path in self.paths.values())

    def run(self, bench: Workbench) -> dict[str, Any]:
        """``{"step_size", "diverged": {test: bool}}``. Rank 0 works alone."""
        if not bench.is_first:
            return {}
        hessian = mean_hessian(bench, self.config, seed=self.seed, products=self._products)
        step_size = choose_step_size(hessian, self.config, seed=self.seed)
        diverged = {}
        for test, gradient in self.gradients.items():
            report = save_inverse_product(hessian, gradient, self.paths[test], self.config, step_size=step_size)
            diverged[test] = report.diverged
        return {"step_size": step_size, "diverged": diverged}


@dataclass(frozen=True)
class DominantEigenpairs:
    """Arnoldi: the dominant eigenpairs of the training loss's Hessian, written to ``folder``."""

    config: ArnoldiConfig
    seed: int
    folder: Path = field(compare=False)

    @property
    def key(self) -> str:
        return f"arnoldi-{self.seed}"

    @property
    def cost(self) -> float:
        return float(self.config.dimension * self.config.examples)

    def written(self) -> bool:
        """Whether the eigenpairs are on disk."""
        return self.folder.is_dir()

    def run(self, bench: Workbench) -> dict[str, Any]:
        """``{"eigenvalues": [...], "asymmetry"}``. Rank 0 works alone."""
        if not bench.is_first:
            return {}
        hessian = mean_hessian(bench, self.config, seed=self.seed, products=self.config.dimension)
        pairs = save_eigenpairs(hessian, self.folder, self.config, seed=self.seed)
        return {"eigenvalues": pairs.values.tolist(), "asymmetry": pairs.asymmetry}


def loss_sums(bench: Workbench, *, passes: int) -> LossSums:
    """The summed loss whose gradients the baselines compare, of examples or of tokens; a job calls it ``passes`` times.

    Each pass is told as progress: a Hessian of many examples takes longer than a worker may be silent.
    """
    done = 0

    def summed(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal done
        bench.progress(min(1.0, done / passes))
        done += 1
        return example_nll_sum(model, batch) if bench.average == "example" else token_nll(model, batch).nll_N.sum()

    return summed


def mean_hessian(bench: Workbench, config: HessianConfig, *, seed: int, products: int) -> MeanHessian:
    """The Hessian of the mean loss over blocks drawn from the whole mixture, at the trained model.

    ``products`` is how often it will be multiplied by a vector, for the progress.
    """
    stream = BlockStream(list(bench.train.values()), batch_size=config.examples, seed=seed)
    blocks = stream.load(stream.refs(0)[: sum(map(len, stream.stores))])
    batches = list(bench.batches(blocks, rows=config.micro_batch, share=False))
    counted = len(blocks) if bench.average == "example" else int(sum(int(label_counts(b).sum()) for b in batches))
    sums = loss_sums(bench, passes=products * len(batches))
    return MeanHessian(bench.start("trained").model, batches, sums, examples=counted)
