"""Lanes with and without a real Ray: the same results whatever the number of lanes, errors that arrive as they were."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isoray.cluster import Cluster, connect
from isoray.errors import DataError, InfraError, IsorayError, NumericError, UserError
from isoray.scaling import ScalingConfig, local_resources, plan
from isoray.training.lane_jobs import job_digest
from isoray.training.lanes import Job, JobRecord, LaneEvent, open_lanes

sys.path.insert(0, str(Path(__file__).parents[1]))
from lane_doubles import Dies, MakeBench, Raises, RaisesUnpicklable, Returns, Walk, run_jobs, walks

pytestmark = pytest.mark.cluster

INPROCESS: dict[str, Any] = {"executor": "inprocess", "cpus_per_worker": 1}
ONE: dict[str, Any] = {"lanes": 1, "cpus_per_worker": 1}
TWO: dict[str, Any] = {"lanes": 2, "cpus_per_worker": 1}
PAIR: dict[str, Any] = {"lanes": 1, "workers_per_lane": 2, "cpus_per_worker": 1}


@pytest.fixture(scope="module")
def ray() -> Iterator[Cluster]:
    with connect(cores=2) as cluster:
        yield cluster


def do(
    jobs: list[Any],
    results: Path,
    scaling: dict[str, Any],
    on_event: Callable[[LaneEvent], None] | None = None,
    *,
    open_bench: Any = MakeBench(),  # noqa: B008 - frozen
    bench_digest: str = "",
) -> dict[str, JobRecord]:
    config = ScalingConfig(**scaling)
    resources = local_resources() if config.executor == "inprocess" else Cluster(None, 2).resources()
    placement = plan(config, resources, jobs=len(jobs))
    return run_jobs(
        jobs,
        open_bench=open_bench,
        placement=placement,
        scaling=config,
        results=results,
        bench_digest=bench_digest,
        on_event=on_event,
    )


def sums(records: dict[str, JobRecord]) -> dict[str, float]:
    return {key: record.result["sum"] for key, record in records.items()}


def test_results_do_not_depend_on_lanes_workers_or_executor(ray: Cluster, tmp_path: Path) -> None:
    expected = do(walks(6), tmp_path / "inprocess", INPROCESS)
    assert len(set(sums(expected).values())) == 6
    for name, scaling in (("one", ONE), ("two", TWO), ("pair", PAIR)):
        records = do(walks(6), tmp_path / name, scaling)
        assert list(records) == [f"walk-{i}" for i in range(6)]
        assert sums(records) == sums(expected)
        assert {r.result["world"] for r in records.values()} == {scaling.get("workers_per_lane", 1)}
        assert {r.result["threads"] for r in records.values()} == {1}
        assert not any(r.reused for r in records.values())
        assert all(r.peak_memory_mb > 50 and r.seconds >= 0 for r in records.values())
        stored = {path.stem: json.loads(path.read_text()) for path in (tmp_path / name).iterdir()}
        assert {key: entry["result"] for key, entry in stored.items()} == {key: r.result for key, r in records.items()}


@pytest.mark.parametrize("scaling", [INPROCESS, TWO])
def test_only_missing_and_changed_jobs_are_done_again(ray: Cluster, tmp_path: Path, scaling: dict[str, Any]) -> None:
    first = do(walks(4), tmp_path, scaling, bench_digest="model-1")
    (tmp_path / "walk-1.json").unlink()
    (tmp_path / "walk-3.json").write_text('{"key": "walk-3", "resu')
    jobs = walks(4)
    jobs[2] = Walk("walk-2", seed=77, cost=2.0)
    again = do(jobs, tmp_path, scaling, bench_digest="model-1")
    assert [again[f"walk-{i}"].reused for i in range(4)] == [True, False, False, False]
    assert again["walk-2"].result != first["walk-2"].result
    assert {k: v for k, v in sums(again).items() if k != "walk-2"} == {
        k: v for k, v in sums(first).items() if k != "walk-2"
    }
    other_bench = do(jobs, tmp_path, scaling, bench_digest="model-2")
    assert not any(record.reused for record in other_bench.values())


def test_nothing_is_started_when_nothing_is_missing(ray: Cluster, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    do(walks(2), tmp_path / "results", ONE, open_bench=MakeBench(marks))
    assert len(list(marks.iterdir())) == 1
    do(walks(2), tmp_path / "results", ONE, open_bench=MakeBench(marks))
    assert len(list(marks.iterdir())) == 1


@pytest.mark.parametrize(("scaling", "benches"), [(INPROCESS, 1), (TWO, 2), (PAIR, 2)])
def test_a_bench_is_opened_once_per_worker_and_kept_over_runs(
    ray: Cluster, tmp_path: Path, scaling: dict[str, Any], benches: int
) -> None:
    config = ScalingConfig(**scaling)
    resources = local_resources() if config.executor == "inprocess" else ray.resources()
    placement = plan(config, resources)
    gate, opened = tmp_path / "gate", 0

    def open_gate(event: LaneEvent) -> None:
        nonlocal opened
        opened += event.kind == "lane_open"
        if opened == placement.lanes or placement.executor == "inprocess":
            gate.touch()

    with open_lanes(MakeBench(tmp_path), placement=placement, scaling=config) as lanes:
        for part in range(3):  # no job ends before every lane is open
            lanes.run(walks(4, gate=gate), results=tmp_path / f"results-{part}", on_event=open_gate)
    assert len(list(tmp_path.glob("bench-*"))) == benches


def test_the_costliest_jobs_are_started_first_and_events_add_up(ray: Cluster, tmp_path: Path) -> None:
    events: list[LaneEvent] = []
    do(walks(5), tmp_path, ONE, events.append)
    assert [e.job for e in events if e.kind == "started"] == [f"walk-{i}" for i in (4, 3, 2, 1, 0)]
    finished = [e for e in events if e.kind == "finished"]
    assert [e.done for e in finished] == [1, 2, 3, 4, 5]
    assert [round(e.work, 6) for e in finished] == [0.4, 0.7, 0.9, 1.0, 1.0]
    assert {e.total for e in events} == {5}


@pytest.mark.parametrize(
    ("scaling", "kind"),
    [(INPROCESS, NumericError), (INPROCESS, UserError), (ONE, NumericError), (TWO, DataError), (PAIR, InfraError)],
)
def test_our_errors_come_out_as_they_were_raised_with_the_job_they_came_from(
    ray: Cluster, tmp_path: Path, scaling: dict[str, Any], kind: type[IsorayError]
) -> None:
    jobs: list[Job] = [Raises("bad", kind.__name__), *walks(2)]
    with pytest.raises(kind, match=r"^job bad: what bad says$") as raised:
        do(jobs, tmp_path, scaling)
    assert type(raised.value) is kind
    if scaling is not INPROCESS:
        assert "lane_doubles.py" in (tmp_path / "bad.failure.txt").read_text()
        assert "lane_doubles.py" in str(raised.value.__cause__)


def test_the_error_of_another_rank_is_told_and_not_its_echo_in_rank_0(ray: Cluster, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="what bad says"):
        do([Raises("bad", "NumericError", on_rank=1)], tmp_path, PAIR)


def test_an_error_that_cannot_be_pickled_keeps_its_message_and_nearest_class(ray: Cluster, tmp_path: Path) -> None:
    with pytest.raises(IsorayError, match="this and that"):
        do([RaisesUnpicklable("bad")], tmp_path, ONE)


@pytest.mark.parametrize("scaling", [INPROCESS, TWO])
def test_a_bug_is_raised_at_once_with_the_worker_s_traceback(
    ray: Cluster, tmp_path: Path, scaling: dict[str, Any]
) -> None:
    events: list[LaneEvent] = []
    with pytest.raises(KeyError, match="what bad says") as raised:
        do([Raises("bad", "KeyError")], tmp_path, scaling, events.append)
    assert [e.kind for e in events].count("started") == 1
    if scaling is TWO:
        assert "raise ERRORS[self.error]" in str(raised.value.__cause__)


@pytest.mark.parametrize("scaling", [INPROCESS, ONE])
def test_a_result_that_is_not_finite_is_a_numeric_error(ray: Cluster, tmp_path: Path, scaling: dict[str, Any]) -> None:
    with pytest.raises(NumericError, match="job bad ended with a number that is not finite"):
        do([Returns("bad", float("nan"))], tmp_path, scaling)
    assert not (tmp_path / "bad.json").exists()


def test_a_job_that_always_kills_its_worker_ends_in_a_named_error(ray: Cluster, tmp_path: Path) -> None:
    events: list[LaneEvent] = []
    with pytest.raises(InfraError, match=r"job killer lost its workers 2 times.*max_failures = 1") as raised:
        do([Dies("killer"), *walks(2)], tmp_path, {**ONE, "max_failures": 1}, events.append)
    assert raised.value.exit_status == 5
    assert [e.job for e in events if e.kind == "lane_lost"] == ["killer"]


def test_lanes_that_find_no_room_end_in_an_error_with_the_sum(ray: Cluster, tmp_path: Path) -> None:
    import ray as ray_module
    from ray.util.placement_group import placement_group, remove_placement_group

    everything = placement_group([{"CPU": ray_module.cluster_resources()["CPU"]}])
    assert everything.wait(30)
    try:
        with pytest.raises(InfraError, match=r"2 lanes x 1 worker x 1 CPU = 2 CPUs wanted, free now: 0 CPUs"):
            do(walks(2), tmp_path, {**TWO, "start_timeout_s": 3})
    finally:
        remove_placement_group(everything)


@pytest.mark.parametrize("keys", [["a", "a"], ["a/b"], [".."], [""]])
def test_keys_that_cannot_be_file_names_are_refused(tmp_path: Path, keys: list[str]) -> None:
    with pytest.raises(ValueError, match="unique and file-name safe"):
        do([Walk(key, seed=1) for key in keys], tmp_path, INPROCESS)


def test_a_digest_hangs_on_what_a_job_does_and_not_on_where_or_when() -> None:
    job = Walk("walk", seed=1)
    assert job_digest(job) == job_digest(Walk("walk", seed=1, cost=99.0, marks=Path("/elsewhere")))
    others = [Walk("walk", seed=2), Walk("other", seed=1), Walk("walk", seed=1, steps=21), Returns("walk", 1)]
    assert len({job_digest(j) for j in [job, *others]} | {job_digest(job, "bench")}) == 6
