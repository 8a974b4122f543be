"""Short jobs for lanes: what a job is, how its result is kept on disk, and the queue they wait in."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from isoray import __version__
from isoray.config.base import digest_of
from isoray.run import storage_errors, to_json, write_json

FILE_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}")


class Job(Protocol):
    """A short piece of work from a common starting point; recipes write them as frozen, picklable dataclasses.

    A job is a pure function of its fields and of the bench, so that it may be done again elsewhere after a failure.
    """

    @property
    def key(self) -> str:
        """Unique among the jobs of a run, and safe as a file name."""

    @property
    def cost(self) -> float:
        """Expected work, in any unit common to the jobs; the costliest are started first."""

    def run(self, bench: Any) -> Mapping[str, Any]:
        """Do the work on what ``open_bench`` returned. Called on every worker of a lane, so collectives are allowed;
        what rank 0 returns counts and must be JSON-able."""


@dataclass(frozen=True)
class JobRecord:
    """A finished job: its result, and apart from it what it took."""

    key: str
    result: dict[str, Any]
    seconds: float
    peak_memory_mb: float
    """Largest resident set of the lane's workers so far, in MiB."""
    lane: int
    reused: bool = False
    """Whether an earlier run did it."""


EventKind = Literal["reused", "started", "progress", "finished", "lane_open", "lane_lost", "lane_waiting"]


@dataclass(frozen=True)
class LaneEvent:
    """Something that a person who watches the run may want to know."""

    kind: EventKind
    done: int
    """Jobs finished, those of earlier runs included."""
    total: int
    work: float
    """Share of this run's work that is done, weighed by cost and with the jobs under way, from 0 to 1."""
    lane: int | None = None
    job: str | None = None
    fraction: float = 0.0
    """Progress of ``job``, from 0 to 1."""
    message: str = ""


def job_digest(job: Job, bench_digest: str = "") -> str:
    """What a stored result must have been made from: the job's class and fields, the bench's digest, isoray's version.

    ``cost`` and fields declared with ``compare=False`` (where things lie, not what they are) do not count.
    """
    assert dataclasses.is_dataclass(job), f"a job is a dataclass, not {type(job).__name__}"
    fields = {
        field.name: _plain(getattr(job, field.name))
        for field in dataclasses.fields(job)
        if field.compare and field.name != "cost"
    }
    return digest_of([type(job).__module__, type(job).__qualname__, fields, bench_digest, __version__])


def _plain(value: object) -> object:
    """``value`` as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.compare}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return to_json(value)


class ResultFiles:
    """One JSON file per finished job in ``folder``, each with the digest of what it was made from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def load(self, key: str, digest: str) -> JobRecord | None:
        """The stored record, or None if there is none, it is torn, or it was made from something else."""
        try:
            stored = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            if stored["digest"] != digest:
                return None
            fields = {name: stored[name] for name in ("key", "result", "seconds", "peak_memory_mb", "lane")}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return JobRecord(**fields, reused=True)

    def save(self, record: JobRecord, digest: str) -> None:
        """Write the record so that it is there whole or not at all. Raises InfraError when the disk is full."""
        stored = dataclasses.asdict(record) | {"digest": digest}
        del stored["reused"]
        write_json(self.folder / f"{record.key}.json", stored)
        (self.folder / f"{record.key}.failure.txt").unlink(missing_ok=True)

    def save_failure(self, key: str, text: str) -> Path:
        """Keep a worker's traceback beside the results."""
        path = self.folder / f"{key}.failure.txt"
        with storage_errors(path):
            path.write_text(text, encoding="utf-8")
        return path


class JobQueue:
    """The jobs of one run: what earlier runs finished, what waits (costliest first), what is done."""

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        results: Path,
        bench_digest: str = "",
        on_event: Callable[[LaneEvent], None] | None = None,
    ) -> None:
        keys = [job.key for job in jobs]
        bad = sorted({key for key in keys if keys.count(key) > 1 or not FILE_SAFE.fullmatch(key)})
        if bad:
            raise ValueError(f"job keys must be unique and file-name safe, which these are not: {bad}")
        self.files = ResultFiles(results)
        self._jobs = list(jobs)
        self._digests = {job.key: job_digest(job, bench_digest) for job in jobs}
        self._on_event = on_event
        self._records: dict[str, JobRecord] = {}
        self._fractions: dict[str, float] = {}
        found = ((job.key, self.files.load(job.key, self._digests[job.key])) for job in jobs)
        self._records.update({key: record for key, record in found if record is not None})
        self._waiting = [job for job in jobs if job.key not in self._records]
        self._waiting.sort(key=lambda job: -job.cost)
        self._costs = {job.key: max(job.cost, 0.0) for job in self._waiting}
        if self._records:
            self.emit("reused", message=f"{len(self._records)} of {len(jobs)} jobs were finished by an earlier run")

    @property
    def missing(self) -> int:
        """Jobs that are not done, waiting or under way."""
        return len(self._jobs) - len(self._records)

    def take(self) -> Job | None:
        """The costliest waiting job, or None."""
        return self._waiting.pop(0) if self._waiting else None

    def give_back(self, job: Job) -> None:
        """Put a job that was not finished back in its place."""
        self._fractions.pop(job.key, None)
        self._waiting.append(job)
        self._waiting.sort(key=lambda job: -job.cost)

    def started(self, job: Job, *, lane: int) -> None:
        self._fractions[job.key] = 0.0
        self.emit("started", lane=lane, job=job.key)

    def progress(self, job: Job, fraction: float, *, lane: int) -> None:
        self._fractions[job.key] = fraction
        self.emit("progress", lane=lane, job=job.key, fraction=fraction)

    def finish(self, job: Job, *, result: dict[str, Any], seconds: float, peak_memory_mb: float, lane: int) -> None:
        """Store a finished job's record."""
        record = JobRecord(job.key, result, round(seconds, 3), round(peak_memory_mb, 1), lane)
        self.files.save(record, self._digests[job.key])
        self._records[job.key] = record
        self._fractions[job.key] = 1.0
        self.emit("finished", lane=lane, job=job.key, fraction=1.0)

    def emit(
        self,
        kind: EventKind,
        *,
        lane: int | None = None,
        job: str | None = None,
        fraction: float = 0.0,
        message: str = "",
    ) -> None:
        if self._on_event is not None:
            done = len(self._records)
            self._on_event(LaneEvent(kind, done, len(self._jobs), self._work(), lane, job, fraction, message))

    def _work(self) -> float:
        # Jobs may all have cost 0; the tiny addend then weighs them alike.
        weights = {key: cost + 1e-9 for key, cost in self._costs.items()}
        total = sum(weights.values())
        return sum(weights[key] * fraction for key, fraction in self._fractions.items()) / total if total else 1.0

    def records(self) -> dict[str, JobRecord]:
        """All records, in the order in which the jobs were given."""
        return {job.key: self._records[job.key] for job in self._jobs}
