"""Lanes on a cluster of several raylets that loses nodes: same numbers with fewer lanes, or a named error in time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from isoray.cluster import Cluster, connect
from isoray.errors import InfraError
from isoray.scaling import ScalingConfig, local_resources, plan
from isoray.training.lanes import JobRecord, LaneEvent

sys.path.insert(0, str(Path(__file__).parents[1]))
from lane_doubles import MakeBench, run_jobs, walks

pytestmark = [pytest.mark.cluster, pytest.mark.chaos]

BOUND_S = 90.0
"""From the loss of a node to the end of the run."""


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A head without CPUs, joined as isoray joins a cluster."""
    from ray.cluster_utils import Cluster as Raylets

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # the jobs; isoray itself is shipped by connect
        soon = {"health_check_period_ms": 1000, "health_check_timeout_ms": 5000, "health_check_failure_threshold": 4}
        arguments = {
            "num_cpus": 0,
            "object_store_memory": 100 * 2**20,
            "include_dashboard": False,
            "_system_config": soon,
        }
        cluster = Raylets(initialize_head=True, head_node_args=arguments)
        try:
            with connect(cluster.address):
                yield cluster
        finally:
            cluster.shutdown()


class Nodes:
    """Nodes of one CPU that join and leave the cluster."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._nodes: list[Any] = []

    def add(self) -> Any:
        self._nodes.append(self._cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20))
        return self._nodes[-1]

    def lose(self, node: Any) -> None:
        """Kill a node's raylet, and wait until the cluster knows."""
        before = alive()
        assert node.node_id in before
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        wait_for(lambda: node.node_id not in alive(), "the node counts as dead")
        assert len(alive()) == len(before) - 1

    def close(self) -> None:
        for node in self._nodes:
            self._cluster.remove_node(node)


@pytest.fixture
def nodes(head: Any) -> Iterator[Nodes]:
    nodes = Nodes(head)
    try:
        yield nodes
    finally:
        nodes.close()


def alive() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


class Background:
    """A run on both nodes, in a thread, so that the test can do its harm meanwhile."""

    def __init__(self, tmp_path: Path, *, start_timeout_s: float, lanes: int = 2, workers_per_lane: int = 1) -> None:
        self.marks, self.gate = tmp_path / "marks", tmp_path / "gate"
        self.marks.mkdir()
        self.events: list[LaneEvent] = []
        config = ScalingConfig(
            lanes=lanes, workers_per_lane=workers_per_lane, cpus_per_worker=1, start_timeout_s=start_timeout_s
        )
        self.future: Future[dict[str, JobRecord]] = ThreadPoolExecutor(1).submit(
            run_jobs,
            walks(6, marks=self.marks, gate=self.gate),
            open_bench=MakeBench(),
            placement=plan(config, Cluster("joined").resources()),
            scaling=config,
            results=tmp_path / "results",
            on_event=self.events.append,
        )

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def starts(self, key: str) -> int:
        return len(list(self.marks.glob(f"{key}.0.*")))


def wait_for(condition: Callable[[], Any], what: str, seconds: float = BOUND_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def undisturbed(tmp_path: Path) -> dict[str, float]:
    config = ScalingConfig(executor="inprocess", cpus_per_worker=1)
    placement = plan(config, local_resources())
    results = tmp_path / "undisturbed"
    return sums(run_jobs(walks(6), open_bench=MakeBench(), placement=placement, scaling=config, results=results))


def sums(records: dict[str, JobRecord]) -> dict[str, float]:
    return {key: record.result["sum"] for key, record in records.items()}


def test_a_lost_node_costs_a_lane_and_a_new_node_brings_it_back(nodes: Nodes, tmp_path: Path) -> None:
    first, _ = nodes.add(), nodes.add()
    run = Background(tmp_path, start_timeout_s=20)
    wait_for(lambda: run.starts("walk-5") and run.starts("walk-4"), "both lanes are at work")
    nodes.lose(first)
    struck = time.monotonic()
    wait_for(lambda: "lane_lost" in run.kinds(), "the loss is noticed")
    wait_for(lambda: "lane_waiting" in run.kinds(), "the lane waits for room")
    nodes.add()
    wait_for(lambda: run.kinds().count("lane_open") == 3, "the lane opens on the new node")
    lost = next(event for event in run.events if event.kind == "lane_lost")
    wait_for(lambda: run.starts(str(lost.job)) == 2, "its job starts again")
    run.gate.touch()
    records = run.future.result(BOUND_S)
    assert time.monotonic() - struck < BOUND_S
    assert {record.lane for record in records.values()} == {0, 1}
    assert sums(records) == undisturbed(tmp_path)


@pytest.mark.slow
def test_a_lost_node_that_nobody_replaces_leaves_fewer_lanes(nodes: Nodes, tmp_path: Path) -> None:
    _, second = nodes.add(), nodes.add()
    run = Background(tmp_path, start_timeout_s=60)
    wait_for(lambda: run.starts("walk-5") and run.starts("walk-4"), "both lanes are at work")
    nodes.lose(second)
    struck = time.monotonic()
    wait_for(lambda: "lane_lost" in run.kinds(), "the loss is noticed")
    run.gate.touch()
    records = run.future.result(BOUND_S)
    assert time.monotonic() - struck < BOUND_S
    lost = next(event for event in run.events if event.kind == "lane_lost")
    assert {record.lane for record in records.values()} == {1 - int(lost.lane or 0)}
    assert run.starts(str(lost.job)) == 2
    assert sums(records) == undisturbed(tmp_path)


@pytest.mark.slow
def test_a_lane_that_spans_two_nodes_and_loses_one_is_rebuilt_as_a_whole(nodes: Nodes, tmp_path: Path) -> None:
    first, _ = nodes.add(), nodes.add()
    run = Background(tmp_path, start_timeout_s=60, lanes=1, workers_per_lane=2)
    wait_for(lambda: len(list(run.marks.glob("walk-5.*"))) == 2, "both ranks are at work")
    nodes.lose(first)
    struck = time.monotonic()
    run.gate.touch()  # the survivor now meets nobody in its collective operation
    wait_for(lambda: "lane_lost" in run.kinds(), "the loss is noticed")
    nodes.add()
    records = run.future.result(BOUND_S)
    assert time.monotonic() - struck < BOUND_S
    assert run.starts("walk-5") == 2
    assert {record.result["world"] for record in records.values()} == {2}
    assert sums(records) == undisturbed(tmp_path)


@pytest.mark.slow
def test_without_any_node_left_the_run_ends_with_the_sum(nodes: Nodes, tmp_path: Path) -> None:
    first, second = nodes.add(), nodes.add()
    run = Background(tmp_path, start_timeout_s=20)
    wait_for(lambda: run.starts("walk-5") and run.starts("walk-4"), "both lanes are at work")
    for node in (first, second):
        nodes.lose(node)
    with pytest.raises(InfraError, match=r"no worker could be started within \d+ s.*2 lanes x 1 worker x 1 CPU = 2"):
        run.future.result(BOUND_S)
    assert run.kinds().count("lane_lost") == 2
