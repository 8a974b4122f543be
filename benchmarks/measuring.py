"""What the benchmarks share: time and memory of a process tree, the environment, the file of results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
BASELINES = REPOSITORY / "benchmarks" / "baselines"
CORES = len(os.sched_getaffinity(0))
PERIOD_S = 1.0
"""How often memory is measured: looking at a process costs time, too."""


class Cost(NamedTuple):
    """What a command took, its children included."""

    seconds: float
    peak_mb: float
    """Greatest sum of proportional set sizes."""


def run(commands: Sequence[Sequence[str]], *, at_once: int = 1, log: Path, environment: Mapping[str, str] = {}) -> Cost:
    """Run ``commands``, ``at_once`` side by side; ends this program with their log when one fails."""
    settings = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    waiting, running = list(commands), list[subprocess.Popen[bytes]]()
    begin = time.perf_counter()
    with log.open("wb") as file, _Peak() as peak:
        while waiting or running:
            while waiting and len(running) < at_once:
                command = waiting.pop(0)
                running.append(subprocess.Popen(command, stdout=file, stderr=file, env={**settings, **environment}))
                peak.roots.append(running[-1].pid)
            for child in running:
                if child.poll():
                    for other in running:
                        other.kill()
                    sys.exit(f"{' '.join(child.args)} failed:\n{log.read_text()}")  # type: ignore[arg-type]
            running = [child for child in running if child.poll() is None]
            time.sleep(0.01)
    return Cost(time.perf_counter() - begin, peak.bytes / 2**20)


class _Peak:
    """The greatest memory of the process trees below ``roots`` while the context is open."""

    def __init__(self) -> None:
        self.roots: list[int] = []
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(PERIOD_S):
            tree = [pid for root in self.roots for pid in _tree(root)]
            self.bytes = max(self.bytes, sum(map(_proportional_set_size, tree)))


def _tree(pid: int) -> Iterator[int]:
    """``pid`` and all its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from _tree(int(child))


def _proportional_set_size(pid: int) -> int:
    """Bytes of memory of a process, of shared pages its share; 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def environment(*packages: str) -> dict[str, str]:
    """What the figures hang on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "machine": f"{cpu}, {CORES} cores, {memory:.0f} GiB",
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version(name)}" for name in packages),
        "commit": commit.stdout.strip() or "?",
        "date": time.strftime("%Y-%m-%d"),
    }


def show_environment(found: Mapping[str, str]) -> None:
    """One line each."""
    for name, value in found.items():
        print(f"{name + ':':14}{value}")
    print(flush=True)


def save(name: str, results: Mapping[str, Any]) -> None:
    """Write ``benchmarks/baselines/<name>.json``."""
    BASELINES.mkdir(exist_ok=True)
    path = BASELINES / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten: {path.relative_to(REPOSITORY)}")
