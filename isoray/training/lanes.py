"""Lanes: persistent worker groups that take short jobs from one starting point off a shared queue.

A lane is a group of Ray actors that opens its bench once (loads the model, maps the data) and keeps it for all its jobs.
The driver holds the queue and writes each finished job's result to its own file at once, so running the same thing again
does only what is missing. What fails is told apart at its source:

- *Workers are lost* (killed, out of memory, node gone, hung): the lane is rebuilt wherever it fits and its job done again.
  A lane that finds no place waits for one while the others go on. Too many losses end the run with InfraError.
- *A job raises*: nothing is retried. An IsorayError comes out as it was raised; anything else is a bug and comes out with
  the worker's traceback as its cause.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from isoray.cluster import Placement, ScalingConfig
from isoray.errors import InfraError
from isoray.training.lane_jobs import Job, JobQueue, JobRecord, LaneEvent
from isoray.training.lane_worker import Done, Failed, LaneWorker, Rank, Seat, as_json, peak_memory_mb

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

POLL_S = 1.0
"""How often lanes are asked for their progress."""
ECHO_S = 90.0
"""How long after a collective operation broke off the worker that caused it may take to be found dead: longer than the
minute in which Ray gives up a node that does not answer."""
STACKS_S = 5.0
"""How long a hung worker may take to say where it stands."""

OpenBench = Callable[[Rank], Any]


class Lanes(Protocol):
    """Lanes that are open for work."""

    def run(
        self,
        jobs: Sequence[Job],
        *,
        results: Path,
        bench_digest: str = "",
        on_event: Callable[[LaneEvent], None] | None = None,
    ) -> dict[str, JobRecord]:
        """Do ``jobs`` and return their records by key, in the order given.

        Each result is kept as ``results/<key>.json`` with a digest of its job and of ``bench_digest`` (what the bench
        holds: checkpoint, data, code version); one with the same digest is not done again. Raises what a job raised,
        and InfraError when workers are lost too often or the storage refuses.
        """


@contextmanager
def open_lanes(open_bench: OpenBench, *, placement: Placement, scaling: ScalingConfig) -> Iterator[Lanes]:
    """Lanes that keep their benches over several :meth:`Lanes.run`. Workers start with the first job that is missing.

    ``open_bench`` is called once in every worker, and again in the workers of a lane that is rebuilt; it must be
    picklable. With executor ``ray`` an open connection (:func:`isoray.cluster.connect`) is needed.
    """
    if placement.executor == "inprocess":
        yield _InProcess(open_bench, threads=placement.cpus, gpus=placement.gpus)
        return
    pool = _Pool(open_bench, placement=placement, scaling=scaling)
    try:
        yield pool
    finally:
        pool.close()


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
    """:func:`open_lanes` and one :meth:`Lanes.run`."""
    with open_lanes(open_bench, placement=placement, scaling=scaling) as lanes:
        return lanes.run(jobs, results=results, bench_digest=bench_digest, on_event=on_event)


class _InProcess:
    """One lane of one worker, which is this process."""

    def __init__(self, open_bench: OpenBench, *, threads: int, gpus: float) -> None:
        self._open_bench = open_bench
        self._threads = threads
        self._device = "cuda:0" if gpus else "cpu"
        self._bench: Any = None
        self._opened = False
        self._progress: Callable[[float], None] = lambda fraction: None

    def run(
        self,
        jobs: Sequence[Job],
        *,
        results: Path,
        bench_digest: str = "",
        on_event: Callable[[LaneEvent], None] | None = None,
    ) -> dict[str, JobRecord]:
        import torch

        queue = JobQueue(jobs, results=results, bench_digest=bench_digest, on_event=on_event)
        threads_before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            while (job := queue.take()) is not None:
                if not self._opened:
                    self._bench = self._open_bench(Rank(0, 1, 0, self._device, self._threads, self._on_progress))
                    self._opened = True
                    queue.emit("lane_open", lane=0)
                self._do(job, queue)
        finally:
            torch.set_num_threads(threads_before)
        return queue.records()

    def _do(self, job: Job, queue: JobQueue) -> None:
        last = time.monotonic()

        def progress(fraction: float) -> None:
            nonlocal last
            if time.monotonic() - last >= POLL_S:
                last = time.monotonic()
                queue.progress(job, fraction, lane=0)

        self._progress = progress
        queue.started(job, lane=0)
        started = time.perf_counter()
        result = as_json(job.key, job.run(self._bench))
        seconds = time.perf_counter() - started
        queue.finish(job, result=result, seconds=seconds, peak_memory_mb=peak_memory_mb(), lane=0)

    def _on_progress(self, fraction: float) -> None:
        self._progress(fraction)


@dataclass
class _Lane:
    """A worker group as the driver sees it. ``since`` is when it last gave a sign of progress."""

    index: int
    group: PlacementGroup
    actors: list[ActorHandle[LaneWorker]]
    state: Literal["placing", "opening", "idle", "running"] = "placing"
    since: float = field(default_factory=time.monotonic)
    calls: dict[ObjectRef[Any], int] = field(default_factory=dict)
    """Calls under way, each with its rank."""
    replies: dict[int, Any] = field(default_factory=dict)
    job: Job | None = None
    beat: ObjectRef[Any] | None = None
    beats: int = 0
    echo: Failed | None = None
    echo_deadline: float = float("inf")
    told_waiting: bool = False


class _Pool:
    """The lanes of one open bench, on Ray."""

    def __init__(self, open_bench: OpenBench, *, placement: Placement, scaling: ScalingConfig) -> None:
        self._open_bench = open_bench
        self._placement = placement
        self._scaling = scaling
        self._lanes: dict[int, _Lane] = {}
        self._queue: JobQueue
        self._losses_of: Counter[str] = Counter()
        self._losses_in_a_row = 0
        self._last_placed = time.monotonic()

    def run(
        self,
        jobs: Sequence[Job],
        *,
        results: Path,
        bench_digest: str = "",
        on_event: Callable[[LaneEvent], None] | None = None,
    ) -> dict[str, JobRecord]:
        self._queue = JobQueue(jobs, results=results, bench_digest=bench_digest, on_event=on_event)
        self._losses_of.clear()
        self._losses_in_a_row = 0
        self._last_placed = time.monotonic()
        for index in range(min(self._placement.lanes, self._queue.missing)):
            if index not in self._lanes:
                self._start(index)
        for lane in self._lanes.values():
            lane.since = time.monotonic()
        while self._queue.missing:
            self._hand_out()
            self._collect()
            for lane in list(self._lanes.values()):
                self._check(lane)
            self._check_anyone_placed()
        return self._queue.records()

    def close(self) -> None:
        """End all workers and free what they held."""
        for lane in self._lanes.values():
            _end(lane)
        self._lanes.clear()

    def _start(self, index: int) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        world = self._placement.workers
        group = placement_group([self._placement.bundle] * world, strategy="PACK")
        worker = ray.remote(LaneWorker)
        actors = [
            worker.options(
                num_cpus=self._placement.cpus,
                num_gpus=self._placement.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
                concurrency_groups={"control": 1},
                max_restarts=0,  # a restarted actor would come back without its bench
            ).remote(ray.util.get_node_ip_address)
            for rank in range(world)
        ]
        lane = _Lane(index, group, actors)
        lane.calls = {actor.sit.remote(rank=rank, world=world): rank for rank, actor in enumerate(actors)}
        self._lanes[index] = lane

    def _open(self, lane: _Lane, seats: dict[int, Seat]) -> None:
        self._last_placed = time.monotonic()
        self._call(lane, "opening", lambda rank: dict(
            open_bench=self._open_bench, rank=rank, world=len(lane.actors), lane=lane.index, threads=self._placement.cpus,
            gpus=self._placement.gpus, meeting=seats[0], collective_timeout_s=self._scaling.collective_timeout_s,
        ))

    def _hand_out(self) -> None:
        for lane in sorted(self._lanes.values(), key=lambda lane: lane.index):
            if lane.state == "idle" and (job := self._queue.take()) is not None:
                lane.job = job
                self._queue.started(job, lane=lane.index)
                lane.calls = {actor.run.remote(job): rank for rank, actor in enumerate(lane.actors)}
