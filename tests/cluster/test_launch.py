"""One training on Ray Train workers: lost workers cost a checkpoint interval, errors come out as they were raised."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import Dies, Raises, Trains
from trainings import in_processes, run_ranks
from untrac_runs import BOUND_S, Gate, gone, wait_until

from isoray.cluster import Cluster, connect
from isoray.errors import InfraError, NumericError
from isoray.scaling import ScalingConfig, plan_training
from isoray.training.launch import launch

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def ray() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        with connect(cores=2) as cluster:
            yield cluster


def do(ray: Cluster, work: Any, scratch: Path, **scaling: Any) -> dict[str, Any]:
    config = ScalingConfig.model_validate({"cpus_per_worker": 1, **scaling})
    try:
        return launch(work, placement=plan_training(config, ray.resources()), scaling=config, scratch=scratch)
    finally:
        assert not scratch.exists(), "Ray Train's own files are removed"


@pytest.mark.chaos
def test_a_killed_worker_costs_less_than_a_checkpoint_interval_and_no_bit(ray: Cluster, tmp_path: Path) -> None:
    """C1 of the fault matrix: two workers, one of which is killed after the checkpoint of step 4."""
    gate = Gate(tmp_path / "gate")
    work = Trains(tmp_path, gate.folder)
    run = ThreadPoolExecutor(1).submit(do, ray, work, tmp_path / "ray", workers=2)
    victim, other = gate.wait_for(number=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    struck = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: gone(victim), "the victim is gone")
    gate.open()
    assert run.result(BOUND_S) == {"first": 5, "last": 8, "world": 2, "threads": 1}
    assert time.monotonic() - struck < BOUND_S
    assert len(gate.arrivals() - {victim, other}) == 2, "both workers were started again"
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    in_processes(run_ranks, 2, "ddp", undisturbed)
    expected, found = torch.load(undisturbed / "weights.pt"), torch.load(tmp_path / "weights.pt")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.chaos
@pytest.mark.parametrize(
    "error", [NumericError("the loss is NaN"), pytest.param(KeyError("a bug"), marks=pytest.mark.slow)]
)
def test_what_one_worker_raises_comes_out_as_it_was_and_is_not_tried_again(
    ray: Cluster, tmp_path: Path, error: Exception
) -> None:
    """The other worker waits in a collective operation, and its echo must not be taken for the cause."""
    marks = tmp_path / "marks"
    marks.mkdir()
    started = time.monotonic()
    with pytest.raises(type(error)) as raised:
        do(ray, Raises(error, on_rank=1, marks=marks), tmp_path / "ray", workers=2, collective_timeout_s=60)
    assert time.monotonic() - started < BOUND_S
    assert raised.value.args == error.args
    assert "launched.py" in str(raised.value.__cause__)
    assert "raise self.error" in str(raised.value.__cause__), "the worker's traceback is kept"
    starts = [int(path.name.partition("-")[0]) for path in marks.iterdir()]
    assert starts.count(1) == 1, "it was not tried again"
    assert starts.count(0) <= 1


@pytest.mark.chaos
def test_a_worker_that_always_dies_ends_in_a_named_error(ray: Cluster, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    with pytest.raises(InfraError, match=r"more than scaling\.max_failures = 1 times.*Run the same command") as raised:
        do(ray, Dies(marks), tmp_path / "ray", max_failures=1)
    assert raised.value.exit_status == 5
    pids = [int(path.name.partition("-")[2]) for path in marks.iterdir()]
    assert pids
    assert all(gone(pid) for pid in pids)
