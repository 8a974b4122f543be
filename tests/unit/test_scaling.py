"""The arithmetic of workers, and the environment a Ray of our own gets."""

from __future__ import annotations

import os
from typing import Any

import pytest

from isoray.errors import UserError
from isoray.scaling import Node, Placement, Resources, ScalingConfig, local_resources, plan, plan_training

TWO_CORES = Resources((Node("a", 2),))
TWO_NODES = Resources((Node("a", 3), Node("b", 3)))
GPUS = Resources((Node("head", 4), Node("g1", 16, 4.0), Node("g2", 16, 4.0)))


def placed(resources: Resources, jobs: int | None = None, **scaling: Any) -> tuple[int, int, int, float]:
    placement = plan(ScalingConfig(**scaling), resources, jobs=jobs)
    return placement.lanes, placement.workers, placement.cpus, placement.gpus


@pytest.mark.parametrize(
    ("resources", "jobs", "scaling", "expected"),
    [
        (TWO_CORES, None, {}, (2, 1, 1, 0)),
        (TWO_CORES, 1, {}, (1, 1, 2, 0)),  # one job gets the whole machine
        (TWO_CORES, 9, {}, (2, 1, 1, 0)),
        (TWO_CORES, 9, {"workers_per_lane": 2}, (1, 2, 1, 0)),
        (TWO_CORES, 9, {"lanes": 1}, (1, 1, 2, 0)),
        (TWO_CORES, 9, {"cpus_per_worker": 2}, (1, 1, 2, 0)),
        (TWO_NODES, None, {"cpus_per_worker": 2}, (2, 1, 2, 0)),  # 6 CPUs, but a worker stands on one node
        (TWO_NODES, 4, {}, (4, 1, 1, 0)),
        (TWO_NODES, 2, {}, (2, 1, 3, 0)),
        (GPUS, None, {}, (8, 1, 4, 1.0)),
        (GPUS, None, {"gpus_per_worker": 0.5, "cpus_per_worker": 2}, (16, 1, 2, 0.5)),
        (GPUS, 2, {"workers_per_lane": 4}, (2, 4, 4, 1.0)),
        (GPUS, None, {"gpus_per_worker": 0}, (36, 1, 1, 0)),
    ],
)
def test_auto_fills_the_machine_and_no_more(
    resources: Resources, jobs: int | None, scaling: dict[str, Any], expected: tuple[int, int, int, float]
) -> None:
    lanes, workers, cpus, gpus = placed(resources, jobs, **scaling)
    assert (lanes, workers, cpus, gpus) == expected
    assert lanes * workers * cpus <= resources.cpus
    assert lanes * workers * gpus <= resources.gpus


@pytest.mark.parametrize("cpus", range(1, 9))
@pytest.mark.parametrize("jobs", [1, 2, 3, 5, 8])
def test_auto_never_oversubscribes_and_leaves_less_than_a_thread_for_each_worker_idle(cpus: int, jobs: int) -> None:
    lanes, _, threads, _ = placed(Resources((Node("a", cpus),)), jobs)
    assert lanes == min(cpus, jobs)
    assert lanes * threads <= cpus < lanes * (threads + 1)


def test_what_cannot_fit_is_refused_with_the_sum() -> None:
    with pytest.raises(UserError) as refused:
        placed(TWO_CORES, lanes=2, workers_per_lane=2, cpus_per_worker=4)
    message = str(refused.value)
    assert "2 lanes x 2 workers x 4 CPUs = 16 CPUs" in message
    assert "2 CPUs on 1 node" in message
    assert "scaling.lanes" in message


def test_workers_that_fit_in_sum_but_on_no_single_node_are_refused() -> None:
    assert TWO_NODES.cpus == 6
    with pytest.raises(UserError, match=r"only 2 such workers can be placed.*on one node; a: 3 CPUs, b: 3 CPUs"):
        placed(TWO_NODES, lanes=3, cpus_per_worker=2)


def test_more_lanes_than_cores_are_refused_also_with_automatic_threads() -> None:
    with pytest.raises(UserError, match="3 lanes x 1 worker x 1 CPU = 3 CPUs"):
        placed(TWO_CORES, lanes=3)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"gpus_per_worker": 2}, "0 such workers"),
        ({"gpus_per_worker": 0.5, "workers_per_lane": 2}, "cannot share a GPU"),
        ({"gpus_per_worker": 1.5}, "whole number"),
    ],
)
def test_impossible_gpus_are_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        placed(TWO_CORES, **scaling)


def test_fractions_of_a_gpu_are_not_added_up_over_gpus() -> None:
    two = Resources((Node("a", 16, 2.0),))
    assert two.slots(1, 0.6) == 2
    assert two.slots(1, 0.5) == 4
    assert two.slots(1, 1 / 3) == 6
    assert two.slots(1, 2.0) == 1


GIB = 2**30


@pytest.mark.parametrize(
    ("memory", "scaling", "lanes"),
    [
        (2 * GIB, {}, 8),
        (5 * GIB, {}, 3),
        (5 * GIB, {"workers_per_lane": 2}, 1),
        (100 * GIB, {}, 1),  # an estimate refuses nothing
        (5 * GIB, {"lanes": 8}, 8),  # nor does it overrule what was asked for
    ],
)
def test_auto_opens_no_more_lanes_than_memory_holds(memory: int, scaling: dict[str, Any], lanes: int) -> None:
    placement = plan(ScalingConfig(**scaling), Resources((Node("a", 8, memory=16 * GIB),)), memory=memory)
    assert placement.lanes == lanes
    assert placement.cpus == 8 // (lanes * placement.workers)


def test_memory_of_the_machine_does_not_limit_lanes_on_gpus() -> None:
    node = Node("a", 8, gpus=4.0, memory=16 * GIB)
    assert plan(ScalingConfig(), Resources((node,)), memory=100 * GIB).lanes == 4


def test_the_memory_of_this_machine_is_what_it_has_and_not_what_is_free() -> None:
    (node,) = local_resources().nodes
    assert node.memory == local_resources().nodes[0].memory > GIB // 4


def test_an_empty_cluster_is_refused_and_not_divided_by() -> None:
    with pytest.raises(UserError, match="no node"):
        placed(Resources(()))


def test_training_takes_its_own_number_of_workers() -> None:
    assert plan_training(ScalingConfig(workers=2), TWO_CORES) == Placement("ray", 1, 2, 1, 0)
    assert plan_training(ScalingConfig(), TWO_CORES) == Placement("ray", 1, 1, 2, 0)
    with pytest.raises(UserError, match="4 workers x 1 CPU = 4 CPUs"):
        plan_training(ScalingConfig(workers=4), TWO_CORES)


def test_inprocess_is_one_worker_with_this_process_cores() -> None:
    placement = plan(ScalingConfig(executor="inprocess"), local_resources())
    assert (placement.executor, placement.lanes, placement.workers) == ("inprocess", 1, 1)
    assert placement.cpus == local_resources().cpus <= (os.cpu_count() or 1)
    with pytest.raises(UserError, match="inprocess"):
        plan(ScalingConfig(executor="inprocess", lanes=2), local_resources())
