"""Explorations on Ray's lanes: shared among several, killed and started again, and equal to the one in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cge_runs import CONTEXT, config, found_texts, run_recipe, write_world

from isoray.cluster import connect

pytestmark = pytest.mark.cluster

BOUND_S = 180
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def settings(home: Path, **explore: Any) -> dict[str, Any]:
    """24 texts by six explorers, each text a job of its own, on lanes of one thread: enough for both to take part,
    however long either takes to open."""
    world = config(home)
    longer = {"sampling": {"max_tokens": CONTEXT - 1}}
    given = {"methods": ["iterative"], "texts": 24, "explorers": 6, "batch": 1, "control": 4, **longer}
    scaling = {"executor": "ray", "lanes": 2, "cpus_per_worker": 1}
    return world | {
        "explore": world["explore"] | given | explore,
        "judge": {},
        "detection": None,
        "scaling": scaling,
    }


def here(home: Path, out: Path) -> list[str]:
    """The same in this process."""
    inprocess = {"executor": "inprocess", "cpus_per_worker": 1}
    return list(found_texts(run_recipe(out, settings(home) | {"scaling": inprocess}), "iterative"))


def test_two_lanes_that_share_a_round_find_what_one_process_finds(home: Path, tmp_path: Path) -> None:
    with connect(cores=2):
        results = run_recipe(tmp_path / "ray", settings(home))
    lanes = {record["lane"] for record in records(tmp_path / "ray")}
    assert lanes == {0, 1}, "one lane did all"
    assert found_texts(results, "iterative") == here(home, tmp_path / "here")


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (out / "jobs").glob("iterative-*.json")]


def test_a_run_that_is_killed_goes_on_with_the_same_texts(home: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "cge.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(settings(home), sort_keys=False))
    command = [sys.executable, "-m", "isoray.cli", "run", str(file), "--out", str(out)]
    first = subprocess.Popen(command, cwd=TESTS, start_new_session=True)
    try:
        wait_for(out / "jobs" / "iterative-0-00004.json", first)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert not (out / "results.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "jobs").glob("*.json")}
    assert len(kept) < 24, "it had finished"
    subprocess.run(command, cwd=TESTS, check=True, timeout=BOUND_S)
    assert all((out / "jobs" / name).stat().st_mtime_ns == when for name, when in kept.items()), "drawn again"
    assert found_texts(read(out), "iterative") == here(home, tmp_path / "here")


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + BOUND_S
    while not path.exists():
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < until, f"{path.name} did not appear"
        time.sleep(0.02)
