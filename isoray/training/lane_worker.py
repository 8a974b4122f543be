"""What runs inside a lane's worker process: open the bench once, then one job after the other. Knows nothing of Ray."""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from isoray import errors
from isoray.errors import IsorayError, NumericError
from isoray.run import to_json
from isoray.training.lane_jobs import Job, JobQueue, JobRecord, LaneEvent
from isoray.training.memory import peak_memory_mb

PROGRESS_S = 1.0
"""How often a person is told how far a job is."""

OpenBench = Callable[["Rank"], Any]
"""Makes what jobs work on (loads the model, maps the data) in a worker process, once for all its jobs."""


@dataclass(frozen=True)
class Rank:
    """A worker's place: ``rank`` of ``world`` workers of ``lane``, with a torch device and its number of threads."""

    rank: int
    world: int
    lane: int
    device: str
    threads: int
    progress: Callable[[float], None]
    """Tell how much of the current job is done, from 0 to 1. Costs nothing; it also proves that the job is alive."""


@dataclass(frozen=True)
class Seat:
    """Where a worker runs, and for rank 0 the port at which the others of its lane find each other."""

    host: str
    pid: int
    port: int | None


@dataclass(frozen=True)
class Done:
    """A call that succeeded; ``result`` is None but for a job on rank 0."""

    result: dict[str, Any] | None
    seconds: float
    peak_memory_mb: float


@dataclass(frozen=True)
class Failed:
    """A call that raised, in a form that survives the way to the driver whatever was raised."""

    pickled: bytes
    trace: str
    peer: bool
    """Whether this is the echo of another worker's end: a collective operation broke off."""

    def error(self) -> Exception:
        """The original exception, with the worker's traceback as its cause."""
        error: Exception = pickle.loads(self.pickled)
        error.__cause__ = RemoteTraceback(self.trace)
        return error


class RemoteTraceback(Exception):
    """Shows a worker's traceback as the cause of the error it led to."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class LaneWorker:
    """One worker of a lane. ``sit``, ``open`` and ``run`` are called one after the other; ``beat`` and ``stacks`` are
    answered meanwhile by another thread. ``address`` gives the node's address in the cluster."""

    def __init__(self, address: Callable[[], str]) -> None:
        self._address = address
        self._beats = 0
        self._fraction = 0.0
        self._bench: Any = None
        self._store: Any = None
        self._rank: Rank | None = None

    def sit(self, *, rank: int, world: int) -> Seat:
        """Take a place; rank 0 of several starts the store at which its lane meets, on a free port of its node."""
        host, port = self._address(), None
        if rank == 0 and world > 1:
            self._store = TCPStore(host, 0, world, is_master=True, wait_for_workers=False)
            port = self._store.port
        return Seat(host, os.getpid(), port)

    def open(
        self,
        open_bench: OpenBench,
        *,
        rank: int,
        world: int,
        lane: int,
        threads: int,
        gpus: float,
        meeting: Seat,
        collective_timeout_s: float,
    ) -> Done | Failed:
        """Join the lane's process group and open the bench, which is kept for all jobs."""
        started = time.perf_counter()
        try:
            device = _prepare_torch(threads=threads, gpus=gpus)
            if world > 1:
                self._join(rank, world, meeting, gpus=gpus, timeout=timedelta(seconds=collective_timeout_s))
            self._rank = Rank(rank, world, lane, device, threads, self._progress)
            self._bench = open_bench(self._rank)
        except Exception as error:  # noqa: BLE001 - the worker's entry: the driver decides
            return failed(error)
        return Done(None, time.perf_counter() - started, peak_memory_mb(torch.device(self._rank.device)))

    def run(self, job: Job) -> Done | Failed:
        """Run one job on the bench."""
        assert self._rank is not None, "open comes before run"
        self._progress(0.0)
        started = time.perf_counter()
        try:
            result = _run(job, self._bench)
            plain = as_json(job.key, result) if self._rank.rank == 0 else None
        except Exception as error:  # noqa: BLE001 - the worker's entry
            return failed(error)
        return Done(plain, time.perf_counter() - started, peak_memory_mb(torch.device(self._rank.device)))

    def beat(self) -> tuple[int, float]:
        """How often progress was made so far, and how far the current job is."""
        return self._beats, self._fraction

    def stacks(self) -> str:
        """Where every thread of this process stands."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return f"process {os.getpid()} on {socket.gethostname()}\n{file.read()}"

    def _progress(self, fraction: float) -> None:
        self._beats += 1
        self._fraction = fraction

    def _join(self, rank: int, world: int, meeting: Seat, *, gpus: float, timeout: timedelta) -> None:
        if rank > 0:
            assert meeting.port is not None
            self._store = TCPStore(meeting.host, meeting.port, world, is_master=False, timeout=timeout)
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        distributed.init_process_group(backend, store=self._store, rank=rank, world_size=world, timeout=timeout)


def _prepare_torch(*, threads: int, gpus: float) -> str:
    torch.set_num_threads(threads)  # of this thread and what it calls, which is where jobs run
    if not gpus:
        return "cpu"
    torch.cuda.set_device(0)  # Ray shows a worker only its own GPUs
    return "cuda:0"


def _run(job: Job, bench: Any) -> Mapping[str, Any]:
    """What the job returns. An IsorayError that it raises says which job it was."""
    try:
        return job.run(bench)
    except IsorayError as error:
        error.args = (f"job {job.key}: {error}",)
        raise


def as_json(key: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """``result`` as it reads back from its file. Raises NumericError for numbers that are not finite."""
    try:
        text = json.dumps(to_json(result), allow_nan=False)
    except ValueError as error:
        raise NumericError(f"job {key} ended with a number that is not finite: {result}") from error
    plain: dict[str, Any] = json.loads(text)
    return plain


def failed(error: Exception) -> Failed:
    """Wrap an exception for the way to the driver; what cannot be pickled is replaced by the nearest that can."""
    trace = "".join(traceback.format_exception(error))
    bare: Exception = error
    try:
        pickled = pickle.dumps(bare)
        pickle.loads(pickled)
    except Exception:  # noqa: BLE001 - a foreign exception's own pickling may raise anything
        if isinstance(error, IsorayError):
            nearest = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
            bare = nearest(str(error))
        else:
            bare = RuntimeError(f"{type(error).__name__}: {error}")
        pickled = pickle.dumps(bare)
    return Failed(pickled, trace, _is_echo(error))


def _is_echo(error: Exception) -> bool:
    if isinstance(error, distributed.DistError):
        return True
    # Gloo reports a closed connection or a timeout as a bare RuntimeError that names its own source file.
    return isinstance(error, RuntimeError) and ("gloo/" in str(error) or "Connection closed by peer" in str(error))


class InProcess:
    """One lane of one worker, which is this process: the same jobs and result files without Ray."""

    def __init__(self, open_bench: OpenBench, *, threads: int, gpus: float) -> None:
        self._open_bench = open_bench
        self._threads = threads
        self._device = "cuda:0" if gpus else "cpu"
        self._bench: Any = None
        self._opened = False
        self._progress: Callable[[float], None] | None = None

    def run(
        self,
        jobs: Sequence[Job],
        *,
        results: Path,
        bench_digest: str = "",
        on_event: Callable[[LaneEvent], None] | None = None,
    ) -> dict[str, JobRecord]:
        """See :meth:`isoray.training.lanes.Lanes.run`."""
        queue = JobQueue(jobs, results=results, bench_digest=bench_digest, on_event=on_event)
        threads_before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            while (job := queue.take()) is not None:
                self._do(job, queue)
        finally:
            torch.set_num_threads(threads_before)
        return queue.records()

    def _do(self, job: Job, queue: JobQueue) -> None:
        told = time.monotonic()

        def progress(fraction: float) -> None:
            nonlocal told
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                queue.progress(job, fraction, lane=0)

        self._progress = progress
        if not self._opened:
            rank = Rank(0, 1, 0, self._device, self._threads, self._on_progress)
            self._bench = self._open_bench(rank)
            self._opened = True
        queue.started(job, lane=0)
        started = time.perf_counter()
        result = as_json(job.key, _run(job, self._bench))
        seconds = time.perf_counter() - started
        peak = peak_memory_mb(torch.device(self._device))
        queue.finish(job, result=result, seconds=seconds, peak_memory_mb=peak, lane=0)

    def _on_progress(self, fraction: float) -> None:
        if self._progress is not None:
            self._progress(fraction)
