"""Jobs for the tests of lanes: small sums whose right answer is known, and jobs that fail in every way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from isoray.errors import DataError, InfraError, IsorayError, NumericError, PolicyError, UserError
from isoray.scaling import Placement, ScalingConfig
from isoray.training.lanes import Job, JobRecord, LaneEvent, OpenBench, Rank, open_lanes

ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (NumericError, DataError, UserError, PolicyError, InfraError, KeyError)
}


@dataclass
class Bench:
    """A weight vector that a job must restore itself, and where the worker is."""

    rank: Rank
    weights: torch.Tensor


@dataclass(frozen=True)
class MakeBench:
    """Opens a bench and leaves a mark of it in ``marks`` (one file per opening, with the process id)."""

    marks: Path | None = None
    dies: bool = False
    """The worker kills itself instead."""

    def __call__(self, rank: Rank) -> Bench:
        if self.marks is not None:
            (self.marks / f"bench-{rank.lane}-{rank.rank}-{os.getpid()}").touch()
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return Bench(rank, torch.linspace(0, 1, 64, dtype=torch.float64))


@dataclass(frozen=True)
class Walk:
    """A random walk of ``steps`` steps from the bench's weights, seeded by ``seed``; averaged over the lane's ranks."""

    key: str
    seed: int
    steps: int = 20
    cost: float = 1.0
    marks: Path | None = field(default=None, compare=False)
    """Where the job says that it was started, by whom."""
    gate: Path | None = field(default=None, compare=False)
    """Half-way the job waits, for at most a minute, until this file is there."""
    step_s: float = field(default=0.0, compare=False)
    """How long a step takes at least."""

    def run(self, bench: Bench) -> Mapping[str, Any]:
        rank = bench.rank
        if self.marks is not None:
            (self.marks / f"{self.key}.{rank.rank}.{os.getpid()}").touch()
        generator = torch.Generator().manual_seed(self.seed)
        weights = bench.weights.clone()
        for step in range(self.steps):
            if step == self.steps // 2:
                self._wait_at_gate()
            weights = torch.sin(weights + 0.1 * torch.randn(64, generator=generator, dtype=torch.float64))
            if rank.world > 1:
                distributed.all_reduce(weights)
                weights /= rank.world
            time.sleep(self.step_s)
            rank.progress((step + 1) / self.steps)
        return {"sum": weights.sum().item(), "threads": torch.get_num_threads(), "world": rank.world}

    def _wait_at_gate(self) -> None:
        deadline = time.monotonic() + 60
        while self.gate is not None and not self.gate.exists() and time.monotonic() < deadline:
            time.sleep(0.02)


@dataclass(frozen=True)
class Raises:
    """A job that fails with an error of ours, or with a bug."""

    key: str
    error: str
    on_rank: int = 0
    cost: float = 10.0

    def run(self, bench: Bench) -> Mapping[str, Any]:
        if bench.rank.rank == self.on_rank:
            raise ERRORS[self.error](f"what {self.key} says")
        distributed.barrier()
        return {}


class LocalError(IsorayError):
    """Cannot be built from a message alone, so it does not survive pickling."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


@dataclass(frozen=True)
class RaisesUnpicklable:
    key: str
    cost: float = 1.0

    def run(self, bench: Bench) -> Mapping[str, Any]:
        raise LocalError("this", "that")


@dataclass(frozen=True)
class Dies:
    """Kills its own worker at once, every time."""

    key: str
    cost: float = 1.0

    def run(self, bench: Bench) -> Mapping[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


@dataclass(frozen=True)
class Returns:
    """Returns what it was given."""

    key: str
    value: Any
    cost: float = 1.0

    def run(self, bench: Bench) -> Mapping[str, Any]:
        return {"value": self.value}


def walks(count: int, **fields: Any) -> list[Walk]:
    return [Walk(f"walk-{i}", seed=i, cost=float(i), **fields) for i in range(count)]


def run_jobs(
    jobs: Sequence[Job],
    *,
    open_bench: OpenBench,
    placement: Placement,
    scaling: ScalingConfig,
    results: Path,
    bench_digest: str = "",
    on_event: Callable[[LaneEvent], None] | None = None,
) -> dict[str, JobRecord]:
    """``open_lanes`` and one ``run``."""
    with open_lanes(open_bench, placement=placement, scaling=scaling) as lanes:
        return lanes.run(jobs, results=results, bench_digest=bench_digest, on_event=on_event)
