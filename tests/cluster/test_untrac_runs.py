"""Whole runs: one seed gives one result, whatever carries the work out and however often the run is started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from untrac_runs import reference, run_here

from isoray.cluster import Cluster, connect

pytestmark = pytest.mark.cluster

INPROCESS = "scaling.executor=inprocess"
ROUNDING = 2e-5
"""Losses of one and of two workers may differ by so much (nats): sums in float32 are taken in another order, and twelve
steps of Adam with a learning rate of 0.01 magnify the last bits."""


@pytest.fixture(scope="module")
def ray() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        with connect(cores=2) as cluster:
            yield cluster


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(tmp_path: Path) -> None:
    assert run_here(tmp_path / "again", INPROCESS) == reference()
    other = run_here(tmp_path / "other", INPROCESS, "seed=4")
    assert other["metrics"] != reference()["metrics"]


def test_a_finished_run_started_again_does_nothing_and_a_changed_one_only_what_changed(tmp_path: Path) -> None:
    """Also the vectors, which are cleared away when they are scored, are not made again for nothing."""
    assert run_here(tmp_path / "run", INPROCESS) == reference()
    assert not (tmp_path / "run" / "scratch" / "vectors").exists()
    done = written(tmp_path / "run")
    assert len(done) > 20
    assert run_here(tmp_path / "run", INPROCESS) == reference()
    assert written(tmp_path / "run") == done
    changed = run_here(tmp_path / "run", INPROCESS, "untrac.optimizer.lr=2e-3")
    assert changed["metrics"] != reference()["metrics"]
    again = {name for name, when in written(tmp_path / "run").items() if done[name] != when}
    assert {name for name in again if name.startswith("untrac-")} == {n for n in done if n.startswith("untrac-")}
    assert not {name for name in again if name.startswith(("without-", "untrac_inv-"))}
    assert run_here(tmp_path / "run", INPROCESS) == reference(), "and back"


def written(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (run / "jobs").glob("*.json")}


def test_two_workers_agree_with_one_within_rounding(ray: Cluster, tmp_path: Path) -> None:
    """Of the training and of the lanes; without dropout, whose masks each worker draws for itself."""
    calm = ["model.dropout=0", "baselines.lissa=null", "baselines.arnoldi=null"]
    one = run_here(tmp_path / "one", INPROCESS, *calm)
    two = run_here(tmp_path / "two", "scaling.workers=2", "scaling.workers_per_lane=2", *calm)
    assert one["metrics"].keys() == two["metrics"].keys()
    for name in ("curves", "training"):
        assert [where(row) for row in one[name]] == [where(row) for row in two[name]]
        for row, other in zip(one[name], two[name], strict=True):
            assert other["loss"] == pytest.approx(row["loss"], abs=ROUNDING), row
    for row, other in zip(one["influence"], two["influence"], strict=True):
        unlearnt = row["estimator"] in ("truth", "untrac", "untrac_inv")
        close = pytest.approx(row["score"], abs=2 * ROUNDING) if unlearnt else pytest.approx(row["score"], rel=1e-2)
        assert other["score"] == close, row
    assert one["training"] != two["training"], "two workers did the work"


def where(row: dict[str, Any]) -> list[Any]:
    return [row.get(key) for key in ("model", "job", "step", "set")]
