"""Progress of a phase: its name, job k of K, the time left. A bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

QUIET_SECONDS = 10.0
"""In a log (not a terminal), lines about one phase are at least so far apart, but for its first and last."""
TELLING = 1e-3
"""How much of a job must be done before its pace says anything about the time left."""


class Phase:
    """One phase of ``jobs`` jobs, as a context manager; jobs may end in any order and from any thread.

    >>> with Phase("leave-one-out", jobs=9) as phase:
    ...     phase.done("without wiki")
    """

    def __init__(self, name: str, *, jobs: int) -> None:
        self.name = name
        self.jobs = jobs
        self.finished = 0.0
        self._note = ""
        self._began = time.monotonic()
        self._printed = -QUIET_SECONDS
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if sys.stderr.isatty():
            self._bar = _bar(self.name, self.jobs)
            self._bar.start()
        else:
            self._say(f"{self.name}: {self.jobs} job{'s' * (self.jobs != 1)}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        seconds = time.monotonic() - self._began
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._say(f"{self.name}: done in {clock(seconds)}")
        else:
            self._say(f"{self.name}: broke off at job {self._current()}/{self.jobs} after {clock(seconds)}")

    def done(self, job: str = "") -> None:
        """One more job has ended."""
        self.advance(1.0, job)

    def advance(self, jobs: float, note: str = "") -> None:
        """``jobs`` more jobs' worth of work (a fraction for a part of one); ``note`` names what was worked on."""
        self.finished = min(self.finished + jobs, float(self.jobs))
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.finished, note=self._note, k=self._current())
        elif time.monotonic() - self._printed >= QUIET_SECONDS:
            whole = self.finished > TELLING and round(self.finished, 6).is_integer()
            job = f"job {round(self.finished)}/{self.jobs} done" if whole else f"job {self._current()}/{self.jobs}"
            note = f" ({self._note})" if self._note else ""
            left = f", about {clock(self.seconds_left())} left" if self.finished > TELLING else ""
            self._say(f"{self.name}: {job}{note}{left}")

    def note(self, message: str) -> None:
        """Say something that a person should see, beside the progress."""
        if self._bar is not None:
            self._bar.console.print(message)
        else:
            self._say(f"{self.name}: {message}")

    def seconds_left(self) -> float:
        """At the mean pace so far."""
        return (time.monotonic() - self._began) / max(self.finished, 1e-9) * (self.jobs - self.finished)

    def _current(self) -> int:
        return min(int(self.finished + 1e-9) + 1, self.jobs)

    def _say(self, line: str) -> None:
        self._printed = time.monotonic()
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def clock(seconds: float) -> str:
    """``75`` as ``1:15``, ``4000`` as ``1:06:40``, below a minute as ``12 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _bar(name: str, jobs: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("job {task.fields[k]} of {task.total:.0f}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", style="dim"),
        console=Console(stderr=True),
    )
    bar.add_task(name, total=jobs, k=1, note="")
    return bar
