"""Lanes whose workers, or whose driver, are killed or stopped on one machine: same numbers, in bounded time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from isoray.cluster import Cluster, connect
from isoray.errors import InfraError
from isoray.scaling import ScalingConfig, local_resources, plan
from isoray.training.lanes import JobRecord, LaneEvent

sys.path.insert(0, str(Path(__file__).parents[1]))
from lane_doubles import MakeBench, Walk, run_jobs, walks

pytestmark = [pytest.mark.cluster, pytest.mark.chaos]

ONE: dict[str, Any] = {"lanes": 1, "cpus_per_worker": 1}
TWO: dict[str, Any] = {"lanes": 2, "cpus_per_worker": 1}
PAIR: dict[str, Any] = {"lanes": 1, "workers_per_lane": 2, "cpus_per_worker": 1}
BOUND_S = 60.0
"""From the fault to the end of the run."""


@pytest.fixture(scope="module")
def ray() -> Iterator[Cluster]:
    with connect(cores=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    config = ScalingConfig(executor="inprocess", cpus_per_worker=1)
    placement = plan(config, local_resources())
    results = tmp_path_factory.mktemp("undisturbed")
    return sums(run_jobs(walks(6), open_bench=MakeBench(), placement=placement, scaling=config, results=results))


class Background:
    """A run in a thread, so that the test can do its harm meanwhile."""

    def __init__(self, jobs: list[Walk], results: Path, resources: Any, scaling: dict[str, Any]) -> None:
        self.events: list[LaneEvent] = []
        config = ScalingConfig(**scaling)
        placement = plan(config, resources, jobs=len(jobs))
        self._pool = ThreadPoolExecutor(1)
        self.future: Future[dict[str, JobRecord]] = self._pool.submit(
            run_jobs,
            jobs,
            open_bench=MakeBench(),
            placement=placement,
            scaling=config,
            results=results,
            on_event=self.events.append,
        )

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


def sums(records: dict[str, JobRecord]) -> dict[str, float]:
    return {key: record.result["sum"] for key, record in records.items()}


def wait_for(condition: Callable[[], Any], what: str, seconds: float = BOUND_S) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)
    return value


def pids(marks: Path, key: str, rank: int = 0) -> set[int]:
    return {int(path.suffix[1:]) for path in marks.glob(f"{key}.{rank}.*")}


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(("scaling", "rank"), [(TWO, 0), pytest.param(PAIR, 0, marks=pytest.mark.slow), (PAIR, 1)])
def test_a_killed_worker_s_job_is_done_again_with_the_same_numbers(
    ray: Cluster, tmp_path: Path, undisturbed: dict[str, float], scaling: dict[str, Any], rank: int
) -> None:
    marks, gate = tmp_path / "marks", tmp_path / "gate"
    marks.mkdir()
    run = Background(walks(6, marks=marks, gate=gate), tmp_path / "results", ray.resources(), scaling)
    victim = wait_for(lambda: pids(marks, "walk-5", rank), "the costliest job starts").pop()
    struck = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: gone(victim), "the victim is gone")
    wait_for(lambda: pids(marks, "walk-5", rank) - {victim}, "the job starts again in another process")
    gate.touch()
    records = run.future.result(BOUND_S)
    assert time.monotonic() - struck < BOUND_S
    assert [e.job for e in run.events if e.kind == "lane_lost"] == ["walk-5"]
    assert sums(records) == undisturbed


@pytest.mark.parametrize(("scaling", "rank"), [pytest.param(ONE, 0, marks=pytest.mark.slow), (PAIR, 1)])
def test_a_stopped_worker_counts_as_hung_and_is_replaced(
    ray: Cluster, tmp_path: Path, undisturbed: dict[str, float], scaling: dict[str, Any], rank: int
) -> None:
    marks, gate = tmp_path / "marks", tmp_path / "gate"
    marks.mkdir()
    patience = {"hang_timeout_s": 8, "start_timeout_s": 40}
    run = Background(walks(6, marks=marks, gate=gate), tmp_path / "results", ray.resources(), scaling | patience)
    victim = wait_for(lambda: pids(marks, "walk-5", rank), "the costliest job starts").pop()
    os.kill(victim, signal.SIGSTOP)
    try:
        wait_for(lambda: psutil.Process(victim).status() == psutil.STATUS_STOPPED, "the victim is stopped")
        wait_for(lambda: "lane_lost" in run.kinds(), "the lane is given up")
        gate.touch()
        records = run.future.result(BOUND_S)
        assert sums(records) == undisturbed
        assert pids(marks, "walk-5", rank) - {victim}
        wait_for(lambda: gone(victim), "the stopped worker is ended, and its CPU free")
    finally:
        if not gone(victim):
            os.kill(victim, signal.SIGKILL)
    assert "no progress" in next(e.message for e in run.events if e.kind == "lane_lost")


def test_a_slow_job_that_shows_progress_is_left_alone(ray: Cluster, tmp_path: Path) -> None:
    started = time.monotonic()
    config = ScalingConfig(**ONE, hang_timeout_s=4)
    placement = plan(config, ray.resources())
    events: list[LaneEvent] = []
    jobs = [Walk("slow", seed=1, steps=50, step_s=0.2)]
    results = tmp_path / "results"
    run_jobs(jobs, open_bench=MakeBench(), placement=placement, scaling=config, results=results, on_event=events.append)
    assert time.monotonic() - started > 2 * config.hang_timeout_s
    assert "lane_lost" not in [e.kind for e in events]
    seen = [e.fraction for e in events if e.kind == "progress"]
    assert len(seen) >= 4
    assert seen == sorted(seen)


def test_benches_that_always_die_end_in_a_named_error(ray: Cluster, tmp_path: Path) -> None:
    config = ScalingConfig(**TWO, max_failures=1)
    placement = plan(config, ray.resources())
    marks = tmp_path / "marks"
    marks.mkdir()
    bench = MakeBench(marks, dies=True)
    with pytest.raises(InfraError, match=r"lost 3 times in a row without a job finishing.*2 lanes x 1 worker x 1 CPU"):
        run_jobs(walks(2), open_bench=bench, placement=placement, scaling=config, results=tmp_path / "results")
    opened = [int(path.name.rpartition("-")[2]) for path in marks.iterdir()]
    assert len(opened) >= 3
    assert all(gone(pid) for pid in opened)


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from isoray.cluster import connect
from isoray.scaling import ScalingConfig, plan
from lane_doubles import MakeBench, run_jobs, walks
folder = Path(sys.argv[1])
config = ScalingConfig(lanes=2, cpus_per_worker=1)
with connect(cores=2) as cluster:
    jobs = walks(6, marks=folder / "marks")
    jobs[0] = walks(1, marks=folder / "marks", gate=folder / "gate")[0]
    placement = plan(config, cluster.resources())
    records = run_jobs(jobs, open_bench=MakeBench(), placement=placement, scaling=config, results=folder / "results")
print(sum(record.reused for record in records.values()), {{k: r.result["sum"] for k, r in records.items()}})
"""


def test_a_killed_driver_takes_its_workers_along_and_the_next_run_does_only_what_is_missing(
    tmp_path: Path, undisturbed: dict[str, float]
) -> None:
    (tmp_path / "marks").mkdir()
    program = DRIVER.format(tests=str(Path(__file__).parents[1]))
    command = [sys.executable, "-c", program, str(tmp_path)]
    driver = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    family: list[psutil.Process] = []
    try:
        results = tmp_path / "results"
        wait_for(lambda: len(list(results.glob("walk-*.json"))) == 5, "five of six jobs are done")
        wait_for(lambda: pids(tmp_path / "marks", "walk-0"), "the last job starts")
        family = psutil.Process(driver.pid).children(recursive=True)
        # Ray's two agents try for a minute to tell the dead GCS about it before they end.
        ends = {process.pid: process.name() for process in family if not process.name().endswith("Agent")}
        assert pids(tmp_path / "marks", "walk-0") <= set(ends)
        assert "raylet" in ends.values()
        driver.kill()
        assert driver.wait(10) == -signal.SIGKILL
        wait_for(lambda: all(gone(pid) for pid in ends), "Ray and its workers end with their driver", 20)
        assert not (results / "walk-0.json").exists()
        (tmp_path / "gate").touch()
        again = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=BOUND_S)
    finally:
        driver.kill()
        for process in family:
            if not gone(process.pid):
                process.kill()
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == f"5 {undisturbed}"
