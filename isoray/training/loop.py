"""The one training loop.

It is a generator of :class:`Step` events: a Ray Train worker, a warm lane or a test drains it. It does not know Ray.
Each optimizer step minimises ``sum over terms of coefficient * sum / count`` with counts taken over all micro-batches
of all ranks. Which blocks step k sees is a pure function of (seed, k, data), so resuming means starting at k.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isoray.config.base import digest_of
from isoray.corpora.stream import Stream
from isoray.errors import NumericError
from isoray.models.structure import drops_out
from isoray.objectives.base import Objective
from isoray.objectives.reduce import Batch
from isoray.training import trees
from isoray.training.batching import Layout, Layouter, MicroBatches
from isoray.training.config import TrainingConfig
from isoray.training.memory import peak_memory_mb
from isoray.training.optim import EarlyUpdates, combined_norm, make_optimizer
from isoray.training.parallel import Parallel, Ranks
from isoray.training.privacy import PrivateUpdates, account_for
from isoray.training.state import Checkpoints

Evaluator = Callable[[Parallel], dict[str, float]]
"""Mean loss (nats) of each named evaluation set; called on every rank, the same answer on each."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports. Fields beside ``step`` and ``total`` are filled when they were measured."""

    step: int
    """Optimizer steps taken so far: 1 after the first."""
    total: int
    loss: float | None = None
    """The objective of this step's batch, before the update; None where a private step drew no example."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Each term's mean."""
    gradient_norm: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    """Labelled tokens of all ranks per second since the last report, evaluation not counted."""
    peak_memory_mb: float | None = None
    evaluation: Mapping[str, float] | None = None
    epsilon: float | None = None
    """What a private training has spent by now (:mod:`isoray.training.privacy`)."""


def train(
    parallel: Parallel,
    objective: Objective,
    streams: Mapping[str, Stream],
    config: TrainingConfig,
    *,
    seed: int,
    pad_token_id: int,
    layout: Layout = "causal",
    reference: nn.Module | None = None,
    evaluator: Evaluator | None = None,
    checkpoints: Checkpoints | None = None,
    pause_every: int | None = None,
) -> Iterator[Step]:
    """Train the model of ``parallel`` in place, from the latest checkpoint where there is one; yields reports.

    Args:
        streams: a stream of blocks for each of the objective's roles.
        pause_every: yield at least every so many steps, so that the caller can look at the model between them.

    Raises:
        UserError: the training is to be private and cannot be.
        NumericError: a loss or gradient is not finite, or nothing trains.
        InfraError: a checkpoint could not be written.
    """
    assert set(objective.roles) == set(streams), f"{objective.kind} needs the roles {objective.roles}"
    total = config.total_steps(next(iter(streams.values())).steps_per_epoch)
    parameters = [p for p in parallel.model.parameters() if p.requires_grad]
    guard = _Guard(parameters, parallel.ranks)
    optimizer = make_optimizer(config.optimizer, parameters)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    accounting = None if config.privacy is None else account_for(config.privacy, streams, steps=total)
    updates = (
        _Updates(parallel, objective, reference, optimizer, parameters, guard, config.clip_norm)
        if accounting is None
        else PrivateUpdates(parallel, objective, optimizer, parameters, guard.check_gradient, accounting, seed=seed)
    )
    layouter = Layouter(parallel.compute, parallel.ranks, pad_token_id=pad_token_id, layout=layout)
    micro_batches = MicroBatches(
        streams, layouter, with_trees=lambda: accounting is None and _takes_trees(objective, parallel)
    )
    start = 0
    if checkpoints is not None and (latest := checkpoints.latest()) is not None:
        start = checkpoints.load(latest, parallel.model, optimizer)

    def due(every: int | None, step: int) -> bool:
        return every is not None and (step + 1) % every == 0

    parallel.model.train()
    clock = _Clock()
    for step in range(start, total):
        last = step + 1 == total
        logs, evaluates = last or due(config.log_every, step), last or due(config.evaluate_every, step)
        saves = checkpoints is not None and due(config.checkpoint_every, step) and not last
        # Dropout depends on nothing but the step, so a resumed run draws what the undisturbed one drew.
        _seed([seed, step, parallel.ranks.rank], parallel.ranks.device)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * config.schedule.factor(step, total)
        # Before a checkpoint, too: broken weights must not replace the last sound ones.
        measure = logs or saves or step == start
        with guard.expect_change(step) if step == start else nullcontext():
            sums, counts, norm = updates.take(micro_batches.at(step), step, measure=measure)
        clock.add(counts)

        if saves:
            assert checkpoints is not None
            checkpoints.save(parallel.model, optimizer, step=step + 1, ranks=parallel.ranks)
        if logs or evaluates or due(pause_every, step):
            terms = guard.check_terms(sums, counts, step)
            coefficients = objective.coefficients(step)
            report = Step(
                step + 1,
                total,
                loss=sum(coefficients[name] * value for name, value in terms.items()) if terms else None,
                terms=terms,
                gradient_norm=None if norm is None else float(norm),
                learning_rate=optimizer.param_groups[0]["lr"],
                tokens_per_second=clock.tokens_per_second(),
                peak_memory_mb=peak_memory_mb(parallel.ranks.device),
                evaluation=evaluator(parallel) if evaluator is not None and evaluates else None,
                epsilon=None if accounting is None else accounting.epsilon(step + 1),
            )
            yield report
            clock.restart()


class _Updates:
    """One optimizer step after the other: gradients, their norm, clipping, the update."""

    def __init__(
        self,
        parallel: Parallel,
        objective: Objective,
        reference: nn.Module | None,
        optimizer: Optimizer,
        parameters: list[nn.Parameter],
        guard: _Guard,
        clip_norm: float | None,
    ) -> None:
        self._parallel, self._objective, self._reference = parallel, objective, reference
        self._optimizer, self._parameters = optimizer, parameters
        self._guard, self._clip_norm = guard, clip_norm
        early = EarlyUpdates(optimizer, parameters)
        # Several ranks and clipping need the gradients whole.
        self._early = early if early.worthwhile and parallel.ranks.world == 1 and clip_norm is None else None

    def take(
        self, micro_batches: list[dict[str, Batch]], step: int, *, measure: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
        """Take step ``step``; this rank's sums and all ranks' counts of the terms, and the gradient's norm if measured.

        Raises NumericError for a measured norm that is zero or not finite.
        """
        parallel, norm = self._parallel, None
        if self._early is not None and len(micro_batches) == 1:
            with self._early.during_backward(measure=measure) as norms:
                sums, counts = _backward(parallel, self._objective, micro_batches, step, self._reference)
            if measure:
                norm = self._guard.check_gradient(combined_norm(norms), step)
            return sums, counts, norm
        sums, counts = _backward(parallel, self._objective, micro_batches, step, self._reference)
        if measure or self._clip_norm is not None:
            norm = self._guard.check_gradient(parallel.gradient_norm(self._parameters), step)
        if self._clip_norm is not None and norm is not None:
            parallel.clip(self._parameters, self._clip_norm, norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return sums, counts, norm


def _takes_trees(objective: Objective, parallel: Parallel) -> bool:
    # With dropout, examples that share a beginning would share what is dropped from it.
    return objective.takes_trees and not drops_out(parallel.model) and trees.supported(parallel)


def _seed(of: list[int], device: torch.device) -> None:
    """Seed the random numbers that a forward pass on ``device`` draws."""
    seed = int(digest_of(of), 16)
    # Not torch.manual_seed: it also leaves calls behind for devices that are not there, each with a formatted stack,
    # which takes as long as a layer of a small model.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _backward(
    parallel: Parallel,
    objective: Objective,
    micro_batches: list[dict[str, Batch]],
    step: int,
    reference: nn.Module | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the whole step; returns this rank's sums and all ranks' counts of the terms."""
    ranks = parallel.ranks
    counts: dict[str, Tensor] = {}
    for batches in micro_batches:
        for name, count in objective.weigh(batches).items():
            counts[name] = counts[name] + count if name in counts else count
    counts = {name: ranks.sum(count.clone()) for name, count in counts.items()}
    # DDP and FSDP average gradients over the ranks; the counts are already global, hence the factor.
    scale = {
        name: coefficient * ranks.world / counts[name].clamp(min=1).double()
        for name, coefficient in objective.coefficients(step).items()
    }
    sums: dict[str, Tensor] = {}
    for index, batches in enumerate(micro_batches):
        with parallel.accumulating(last=index == len(micro_batches) - 1):
            terms = parallel.call(objective.terms, batches, reference)
            loss = torch.stack([scale[name] * value for name, value in terms.items()]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        for name, value in terms.items():
            detached = value.detach()
            sums[name] = sums[name] + detached if name in sums else detached
    return sums, counts


class _Guard:
    """That something really trains: finite losses, non-zero gradients, changed weights."""

    def __init__(self, parameters: list[nn.Parameter], ranks: Ranks) -> None:
        if not parameters:
            raise NumericError("nothing can train: no parameter of the model requires a gradient.")
        self._parameters, self._ranks = parameters, ranks

    def check_gradient(self, norm: Tensor, step: int) -> Tensor:
        """The norm itself; raises NumericError when it is zero or not finite."""
        value = float(norm)
        if value == 0.0:
            raise NumericError(
                f"step {step + 1}: the gradient is zero, nothing trains. Check that the data has labels, that the "
                "learning rate's warm-up does not start at 0 and that adapters reach the layers they should."
            )
        if not torch.isfinite(norm):
            raise NumericError(
                f"step {step + 1}: the gradient's norm is {value}. Lower its optimizer.lr, set its "
                "clip_norm, or use precision fp32; the last checkpoint is kept."
            )
        return norm

    @contextmanager
    def expect_change(self, step: int) -> Iterator[None]:
        """Raises NumericError when the update inside the block leaves a sample of every parameter as it was."""
        before = [self._sample(p).clone() for p in self._parameters]
        yield
        changed = torch.tensor(
            any(not torch.equal(old, self._sample(p)) for old, p in zip(before, self._parameters, strict=True)),
            dtype=torch.int64,
            device=self._ranks.device,
        )
        if int(self._ranks.sum(changed)) == 0:
            raise NumericError(
                f"step {step + 1}: no weight changed. The learning rate is too small for the weights' precision."
            )

    def check_terms(self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], step: int) -> dict[str, float]:
        """The means of the terms over all ranks; raises NumericError where one is not finite."""
        totals = {name: float(self._ranks.sum(value.clone())) for name, value in sums.items()}
        means = {name: total / max(1, int(counts[name])) for name, total in totals.items()}
        for name, value in means.items():
            if not torch.isfinite(torch.tensor(value)):
                raise NumericError(
                    f"step {step + 1}: the term {name!r} is {value}. Lower its optimizer.lr or set its "
                    "clip_norm; the last checkpoint is kept."
                )
        return means

    @staticmethod
    def _sample(parameter: nn.Parameter) -> Tensor:
        data = parameter.detach()
        local = data.to_local() if hasattr(data, "to_local") else data
        return local.flatten()[:4096]


class _Clock:
    """Labelled tokens per second between reports."""

    def __init__(self) -> None:
        self._tokens: Tensor | int = 0
        self._since = time.perf_counter()

    def add(self, counts: Mapping[str, Tensor]) -> None:
        self._tokens = self._tokens + max(counts.values(), key=int)

    def tokens_per_second(self) -> float:
        return float(self._tokens) / max(1e-9, time.perf_counter() - self._since)

    def restart(self) -> None:
        self._tokens = 0
        self._since = time.perf_counter()
