"""A whole UnTrac run on a cluster of two raylets that loses one while retrainings run: same numbers, with one lane."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from untrac_runs import BOUND_S, TESTS, Gate, reference, run_in_background, wait_until

from isoray.cluster import connect

pytestmark = [pytest.mark.cluster, pytest.mark.chaos]


def alive() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@pytest.mark.slow
def test_a_lost_node_costs_a_lane_and_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster as Raylets

    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))  # the objective with the gate; isoray itself is shipped by connect
    gate, out = Gate(tmp_path / "gate"), tmp_path / "run"
    head = {"num_cpus": 0, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Raylets(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20) for _ in range(2)]
        with connect(cluster.address):
            run = run_in_background(out, *gate.overrides, address=cluster.address)
            (trainer,) = gate.wait_for()
            gate.let_pass(trainer)
            lanes = gate.wait_for(trainer, number=2)
            before = alive()
            assert nodes[0].node_id in before
            cluster.remove_node(nodes[0], allow_graceful=False)
            struck = time.monotonic()
            wait_until(lambda: nodes[0].node_id not in alive(), "the node counts as dead")
            assert len(alive()) == len(before) - 1
            gate.open()
            assert run.result(BOUND_S) == reference()
            assert time.monotonic() - struck < BOUND_S
    finally:
        cluster.shutdown()
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("event") for row in events].count("lane_lost") == 1
    assert len(lanes) == 2
    assert trainer not in lanes
