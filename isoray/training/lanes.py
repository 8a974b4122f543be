"""Lanes: persistent worker groups that take short jobs from one starting point off a shared queue.

A lane is a group of Ray actors that opens its bench once (loads the model, maps the data) and keeps it for all its
jobs. The driver holds the queue and writes each finished job's result to its own file at once, so running the same
thing again does only what is missing. What fails is told apart at its source:

- *Workers are lost* (killed, out of memory, node gone, hung): the lane is rebuilt wherever it fits and its job is done
  again. A lane that finds no place waits for one while the others go on. Too many losses end the run with InfraError.
- *A job raises*: nothing is retried. An IsorayError comes out as it was raised; anything else is a bug and comes out
  with the worker's traceback as its cause.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from isoray.errors import InfraError
from isoray.scaling import Placement, ScalingConfig
from isoray.training.lane_jobs import Job, JobQueue, JobRecord, LaneEvent
from isoray.training.lane_worker import Done, Failed, InProcess, LaneWorker, OpenBench, Rank, Seat

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.util.placement_group import PlacementGroup

POLL_S = 1.0
"""How often lanes are asked for their progress."""
ECHO_S = 90.0
"""How long after a collective operation broke off the worker that caused it may take to be found dead: longer than the
minute in which Ray gives up a node that does not answer."""
STACKS_S = 5.0
"""How long a hung worker may take to say where it stands."""

__all__ = ["Job", "JobRecord", "LaneEvent", "Lanes", "OpenBench", "Rank", "open_lanes"]


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
        holds: checkpoint, data); one with the same digest is not done again. Raises what a job raised,
        and InfraError when workers are lost too often or the storage refuses.
        """


@contextmanager
def open_lanes(open_bench: OpenBench, *, placement: Placement, scaling: ScalingConfig) -> Iterator[Lanes]:
    """Lanes that keep their benches over several :meth:`Lanes.run`. Workers start with the first job that is missing.

    ``open_bench`` is called once in every worker, and again in the workers of a lane that is rebuilt; it must be
    picklable. With executor ``ray`` an open connection (:func:`isoray.cluster.connect`) is needed.
    """
    if placement.executor == "inprocess":
        yield InProcess(open_bench, threads=placement.cpus, gpus=placement.gpus)
        return
    pool = _Pool(open_bench, placement=placement, scaling=scaling)
    try:
        yield pool
    finally:
        pool.close()


@dataclass
class _Lane:
    """A worker group as the driver sees it."""

    index: int
    group: PlacementGroup
    actors: list[Any]
    """Handles of :class:`LaneWorker` actors, by rank."""
    state: Literal["placing", "opening", "idle", "running"] = "placing"
    since: float = field(default_factory=time.monotonic)
    """When it last showed progress."""
    calls: dict[ObjectRef[Any], int] = field(default_factory=dict)
    """Calls under way, each with its rank."""
    replies: dict[int, Any] = field(default_factory=dict)
    job: Job | None = None
    beat: ObjectRef[Any] | None = None
    beat_asked: float = 0.0
    beats: int = 0
    echo: Failed | None = None
    """A collective operation broke off; which worker's end was the cause is not known yet."""
    echo_since: float = 0.0
    told_waiting: bool = False

    def call(self, state: Literal["placing", "opening", "running"], refs: Sequence[ObjectRef[Any]]) -> None:
        self.state, self.since = state, time.monotonic()
        self.calls = {ref: rank for rank, ref in enumerate(refs)}
        self.replies, self.echo = {}, None


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
        self._placed_at = 0.0

    def run(
        self,
        jobs: Sequence[Job],
        *,
        results: Path,
        bench_digest: str = "",
        on_event: Callable[[LaneEvent], None] | None = None,
    ) -> dict[str, JobRecord]:
        """See :meth:`Lanes.run`."""
        self._queue = JobQueue(jobs, results=results, bench_digest=bench_digest, on_event=on_event)
        self._losses_of.clear()
        self._losses_in_a_row = 0
        self._placed_at = time.monotonic()
        for lane in self._lanes.values():
            lane.since = time.monotonic()  # the time between two runs is nobody's fault
        try:
            for index in range(min(self._placement.lanes, self._queue.missing)):
                if index not in self._lanes:
                    self._start(index)
            while self._queue.missing:
                self._hand_out()
                self._collect()
                for lane in list(self._lanes.values()):
                    self._watch(lane)
                self._check_anyone_placed()
        except BaseException:
            self.close()  # the other lanes are in the middle of jobs that nobody waits for
            raise
        return self._queue.records()

    def close(self) -> None:
        """End all workers and free what they held."""
        for lane in self._lanes.values():
            _end(lane)
        self._lanes.clear()

    def _start(self, index: int) -> None:
        """Ask for a lane's workers; Ray places them together, now or when there is room."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        world = self._placement.workers
        group = placement_group([self._placement.bundle] * world, strategy="PACK")
        remote: Any = ray.remote  # whose annotations lack concurrency_groups
        worker = remote(
            num_cpus=self._placement.cpus,
            num_gpus=self._placement.gpus,
            concurrency_groups={"control": 1},
            max_restarts=0,  # a restarted actor would come back without its bench
        )(LaneWorker)
        places = [PlacementGroupSchedulingStrategy(group, rank) for rank in range(world)]
        actors = [worker.options(scheduling_strategy=p).remote(ray.util.get_node_ip_address) for p in places]
        self._lanes[index] = lane = _Lane(index, group, actors)
        lane.call("placing", [actor.sit.remote(rank=rank, world=world) for rank, actor in enumerate(actors)])

    def _open(self, lane: _Lane, meeting: Seat) -> None:
        self._placed_at = time.monotonic()
        common: dict[str, Any] = {
            "world": len(lane.actors),
            "lane": lane.index,
            "threads": self._placement.cpus,
            "gpus": self._placement.gpus,
            "meeting": meeting,
            "collective_timeout_s": self._scaling.collective_timeout_s,
        }
        actors = enumerate(lane.actors)
        lane.call("opening", [actor.open.remote(self._open_bench, rank=rank, **common) for rank, actor in actors])

    def _hand_out(self) -> None:
        for lane in self._lanes.values():
            if lane.state == "idle" and (job := self._queue.take()) is not None:
                lane.job = job
                lane.call("running", [actor.run.remote(job) for actor in lane.actors])
                self._queue.started(job, lane=lane.index)

    def _collect(self) -> None:
        """Wait a moment for replies, and take in those that came."""
        import ray

        refs = {ref: lane for lane in self._lanes.values() for ref in lane.calls}
        ray.wait(list(refs), timeout=POLL_S)  # for the first
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        for ref in ready:
            lane = refs[ref]
            if ref not in lane.calls:  # the lane was lost with an earlier reply
                continue
            try:
                reply = ray.get(ref)
            except ray.exceptions.RayTaskError as error:  # what the worker was sent does not load there
                cause: Exception = error.as_instanceof_cause()  # type: ignore[no-untyped-call]
                raise cause from None
            except ray.exceptions.RayError as error:
                self._lose(lane, _death(error))
                continue
            rank = lane.calls.pop(ref)
            if isinstance(reply, Failed):
                self._take_failure(lane, rank, reply)
            else:
                lane.replies[rank] = reply
                if not lane.calls and lane.echo is None:
                    self._complete(lane)

    def _complete(self, lane: _Lane) -> None:
        """All workers of the lane have replied."""
        if lane.state == "placing":
            self._open(lane, lane.replies[0])
            return
        if lane.state == "opening":
            self._queue.emit("lane_open", lane=lane.index)
        else:
            assert lane.job is not None
            done: Done = lane.replies[0]
            assert done.result is not None
            peak = max(reply.peak_memory_mb for reply in lane.replies.values())
            job, lane.job = lane.job, None
            self._losses_in_a_row = 0
            self._queue.finish(job, result=done.result, seconds=done.seconds, peak_memory_mb=peak, lane=lane.index)
        lane.state = "idle"

    def _take_failure(self, lane: _Lane, rank: int, failure: Failed) -> None:
        if failure.peer:
            # Raising here would blame the survivor: wait for the others' replies or deaths.
            lane.echo, lane.echo_since = failure, time.monotonic()
            return
        key = lane.job.key if lane.job else f"open-lane-{lane.index}"
        self._queue.files.save_failure(key, f"lane {lane.index}, worker {rank}\n{failure.trace}")
        raise failure.error()

    def _watch(self, lane: _Lane) -> None:
        """Take in the lane's progress, and find out whether it hangs."""
        waited = time.monotonic() - lane.since
        if lane.state == "placing":
            self._watch_placing(lane, waited)
        elif lane.echo is not None:
            if not lane.calls or time.monotonic() - lane.echo_since > ECHO_S:
                self._lose(lane, f"a collective operation broke off: {lane.echo.error()}")
        elif lane.state != "idle":
            self._take_beat(lane)
            if waited > self._scaling.hang_timeout_s:
                self._keep_stacks(lane)
                self._lose(lane, f"no progress for {waited:.0f} s (scaling.hang_timeout_s)")

    def _watch_placing(self, lane: _Lane, waited: float) -> None:
        if waited <= self._scaling.start_timeout_s:
            return
        if lane.group.wait(0):
            self._lose(lane, f"its workers did not start within {waited:.0f} s (scaling.start_timeout_s)")
        elif not lane.told_waiting:
            lane.told_waiting = True
            self._queue.emit("lane_waiting", lane=lane.index, message=f"there is no room for lane {lane.index} now")

    def _take_beat(self, lane: _Lane) -> None:
        import ray

        if lane.beat is not None and ray.wait([lane.beat], timeout=0)[0]:
            try:
                beats, fraction = ray.get(lane.beat)
            except ray.exceptions.RayError:  # its other calls will tell
                beats, fraction = lane.beats, 0.0
            lane.beat = None
            if beats != lane.beats:
                lane.beats, lane.since = beats, time.monotonic()
                if lane.job is not None:
                    self._queue.progress(lane.job, fraction, lane=lane.index)
        if lane.beat is None and time.monotonic() - lane.beat_asked >= POLL_S:
            lane.beat_asked = time.monotonic()
            lane.beat = lane.actors[0].beat.options(concurrency_group="control").remote()

    def _keep_stacks(self, lane: _Lane) -> None:
        """Write where a hung lane's workers stand beside the results."""
        import ray

        calls: list[Any] = [actor.stacks.options(concurrency_group="control").remote() for actor in lane.actors]
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=STACKS_S)
        texts: list[str] = []
        for call in calls:
            try:
                texts.append(ray.get(call) if call in ready else "a worker did not answer")
            except ray.exceptions.RayError as error:
                texts.append(_death(error))
        self._queue.files.save_failure(lane.job.key if lane.job else f"open-lane-{lane.index}", "\n\n".join(texts))

    def _lose(self, lane: _Lane, cause: str) -> None:
        """Replace a lane whose workers are gone or useless, and give its job back."""
        _end(lane)
        self._losses_in_a_row += 1
        limit = self._scaling.max_failures
        what = f"lane {lane.index} was lost ({cause})"
        if lane.job is not None:
            self._losses_of[lane.job.key] += 1
            self._queue.give_back(lane.job)
            what = f"lane {lane.index} was lost with job {lane.job.key} ({cause})"
            if self._losses_of[lane.job.key] > limit:
                raise InfraError(
                    f"job {lane.job.key} lost its workers {self._losses_of[lane.job.key]} times, more than "
                    f"scaling.max_failures = {limit} allows; the last time: {cause}. {_ADVICE}"
                )
        if self._losses_in_a_row > limit * self._placement.lanes:
            raise InfraError(
                f"workers were lost {self._losses_in_a_row} times in a row without a job finishing, more than "
                f"scaling.max_failures = {limit} allows for {self._placement}; the last: {what}. {_ADVICE}"
            )
        self._queue.emit("lane_lost", lane=lane.index, job=lane.job.key if lane.job else None, message=what)
        self._start(lane.index)

    def _check_anyone_placed(self) -> None:
        if any(lane.state != "placing" for lane in self._lanes.values()):
            self._placed_at = time.monotonic()
        elif (waited := time.monotonic() - self._placed_at) > self._scaling.start_timeout_s:
            raise InfraError(
                f"no worker could be started within {waited:.0f} s (scaling.start_timeout_s): {self._placement} "
                f"wanted, {_free()}. Wait for the cluster to have room or ask for less, then run the same command again"
            )


_ADVICE = (
    "If memory ran out, use fewer lanes or smaller batches; then run the same command again: finished jobs are kept"
)


def _end(lane: _Lane) -> None:
    import ray
    from ray.util.placement_group import remove_placement_group

    lane.calls = {}
    for actor in lane.actors:
        ray.kill(actor)
    remove_placement_group(lane.group)


def _free() -> str:
    import ray

    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return f"free now: {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"


def _death(error: Exception) -> str:
    """What Ray says about a worker's death, without its general advice."""
    facts = dict(re.findall(r"^\s+(pid|ip): (\S+)$", str(error), re.MULTILINE))
    last = str(error).strip().splitlines()[-1]
    told = re.split(r"\.? (?:Some common causes|There are some potential root causes)", last)[0].rstrip(".")
    return told + (f" (process {facts['pid']} on {facts['ip']})" if len(facts) == 2 else "")
