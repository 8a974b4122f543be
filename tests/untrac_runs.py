"""Runs of the smallest UnTrac config, disturbed and undisturbed, and what must be equal between them."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from isoray.config.load import load
from isoray.recipes.base import Recipe
from isoray.run import Run

TESTS = Path(__file__).parent
CONFIG = TESTS / "configs" / "untrac.yaml"
BOUND_S = 120.0
"""From a fault to the end of the run; idle it takes a fifth of that."""
TIMES = {"seconds", "worker_seconds", "tokens_per_second", "peak_memory_mb", "reused"}


def run_here(out: Path, *overrides: str, address: str | None = None) -> dict[str, Any]:
    """Run the config in this process; its :func:`numbers`."""
    loaded = load(CONFIG, overrides)
    with Run.open(out, loaded.config, recipe="untrac", address=address) as run:
        Recipe.build(loaded.config).run(run)  # type: ignore[attr-defined]
    return numbers(out)


def run_in_background(out: Path, *overrides: str, address: str | None = None) -> Future[dict[str, Any]]:
    """:func:`run_here` in a thread, so that the test can do its harm meanwhile."""
    return ThreadPoolExecutor(1).submit(run_here, out, *overrides, address=address)


def command(out: Path, *overrides: str) -> list[str]:
    """The command line of the same run."""
    return [sys.executable, "-m", "isoray.cli", "run", str(CONFIG), *overrides, "--out", str(out)]


def environment() -> dict[str, str]:
    """For :func:`command`: finds isoray and the tests' components."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}


def numbers(folder: Path) -> dict[str, Any]:
    """Metrics and tables of a finished run, without what hangs on the clock."""
    results = json.loads((folder / "results.json").read_text())
    tables = {
        name: [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        for name, rows in results["tables"].items()
    }
    return {"metrics": results["metrics"], **tables}


def reference() -> dict[str, Any]:
    """The numbers of an undisturbed run without Ray; the same object on every call. Do not change it."""
    return _reference()


@functools.cache
def _reference() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = run_here(Path(folder) / "run", "scaling.executor=inprocess")
    assert len(found["metrics"]) > 20
    assert len({row["score"] for row in found["influence"]}) > 20
    return found


class Gate:
    """The test's side of :class:`gated.Gated`."""

    def __init__(self, folder: Path, *, is_open: bool = False) -> None:
        self.folder = folder
        folder.mkdir()
        if is_open:
            self.open()

    @property
    def overrides(self) -> list[str]:
        """That make a run stop at this gate."""
        return ["objective.kind=gated:Gated", f"objective.gate={self.folder}"]

    def arrivals(self) -> set[int]:
        """Processes that stand or stood at the gate."""
        return {int(path.name.removeprefix("at-")) for path in self.folder.glob("at-*")}

    def wait_for(self, *others_than: int, number: int = 1, seconds: float = BOUND_S) -> list[int]:
        """``number`` processes at the gate beside ``others_than``."""
        wait_until(lambda: len(self.arrivals() - set(others_than)) >= number, f"{number} at the gate", seconds)
        return sorted(self.arrivals() - set(others_than))

    def let_pass(self, pid: int) -> None:
        (self.folder / f"go-{pid}").touch()

    def open(self) -> None:
        (self.folder / "go").touch()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = BOUND_S) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)
    return value


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
