"""Whole UnTrac runs that lose workers or their driver, run out of disk or of numbers: same results, or a named end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from untrac_runs import (
    BOUND_S,
    Gate,
    command,
    environment,
    gone,
    numbers,
    reference,
    run_here,
    run_in_background,
    wait_until,
)

from isoray.cluster import connect

pytestmark = [pytest.mark.cluster, pytest.mark.chaos]

INPROCESS = "scaling.executor=inprocess"


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(pid), "the victim is gone")


def training_steps(run: Path) -> Counter[int]:
    """How often each step of the full training was done."""
    log = next((run / "steps").glob("*training*/metrics.jsonl"))
    return Counter(json.loads(line)["step"] for line in log.read_text().splitlines())


def test_a_run_that_loses_its_training_worker_and_then_a_lane_is_the_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    gate, out = Gate(tmp_path / "gate"), tmp_path / "run"
    with connect(cores=2):
        run = run_in_background(out, *gate.overrides, "scaling.lanes=2")
        (trainer,) = gate.wait_for()
        kill(trainer)
        struck = time.monotonic()
        (second,) = gate.wait_for(trainer)
        assert training_steps(out) == Counter([1, 2, 3, 4, 5, 5]), "it went on after the checkpoint of step 4"
        gate.let_pass(second)
        lanes = gate.wait_for(trainer, second, number=2)
        assert not list((out / "jobs").glob("without-*.json")), "the lanes' first retrainings are under way"
        kill(lanes[0])
        (third,) = gate.wait_for(trainer, second, *lanes)
        gate.open()
        assert run.result(BOUND_S) == reference()
        assert time.monotonic() - struck < BOUND_S
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("event") for row in events].count("lane_lost") == 1
    assert third not in lanes


@pytest.mark.slow
def test_a_run_whose_driver_is_killed_twice_goes_on_where_it_was(tmp_path: Path) -> None:
    """In the training and in the lanes; the third start, which needs no Ray, ends with the undisturbed numbers."""
    gate, out = Gate(tmp_path / "gate"), tmp_path / "run"
    line = command(out, *gate.overrides, "scaling.lanes=1")
    with Driver(line) as first:
        (trainer,) = gate.wait_for()
        assert trainer in kill_with_family(first)
    with Driver(line) as second:
        (again,) = gate.wait_for(trainer)
        gate.let_pass(again)
        (lane,) = gate.wait_for(trainer, again)
        assert training_steps(out) == Counter([*range(1, 13), 5]), "the second start went on after the checkpoint"
        checkpoints = list((out / "scratch" / "checkpoints").glob("without-*/step-00000004"))
        assert len(checkpoints) == 1
        assert lane in kill_with_family(second)
    gate.open()
    started = time.monotonic()
    third = subprocess.run([*line, INPROCESS], env=environment(), capture_output=True, text=True, timeout=BOUND_S)
    assert third.returncode == 0, third.stderr
    assert time.monotonic() - started < BOUND_S
    assert numbers(out) == reference()


class Driver:
    """A run as a subprocess, which does not outlive the test."""

    def __init__(self, line: list[str]) -> None:
        self._line = line

    def __enter__(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(self._line, env=environment(), stdout=subprocess.DEVNULL)
        return self.process

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
        self.process.kill()
        self.process.wait()


def kill_with_family(process: subprocess.Popen[bytes]) -> set[int]:
    """SIGKILL of a driver; its Ray and its workers must end by themselves. The workers' process ids."""
    family = psutil.Process(process.pid).children(recursive=True)
    # Ray's two agents try for a minute to tell the dead GCS about it before they end.
    ends = {member.pid for member in family if not member.name().endswith("Agent")}
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    try:
        wait_until(lambda: all(gone(pid) for pid in ends), "Ray and its workers end with their driver", 30)
    finally:
        for member in family:
            if not gone(member.pid):
                member.kill()
    return ends


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk (needs root): {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # this process still maps some of its files


def test_a_full_disk_ends_a_run_with_status_5_and_room_lets_it_go_on(small_disk: Path) -> None:
    out = small_disk / "run"
    line = command(out, INPROCESS)
    full = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=BOUND_S)
    assert full.returncode == 5, full.stderr
    message = full.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "No space left on device" in message
    assert "the same command again" in message
    assert "Traceback" not in full.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert run_here(out, INPROCESS) == reference()


def test_broken_numbers_end_a_run_with_status_4_and_the_last_sound_checkpoint(tmp_path: Path) -> None:
    gate, out = Gate(tmp_path / "gate", is_open=True), tmp_path / "run"
    line = command(
        out, INPROCESS, *gate.overrides, "objective.nan=true", "training.log_every=12", "training.clip_norm=null"
    )
    ended = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=BOUND_S)
    assert ended.returncode == 4, ended.stderr
    assert "error: step 8: the gradient's norm is nan" in ended.stderr
    assert "Traceback" not in ended.stderr
    checkpoints = out / "steps" / ".training.partial" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"]


def test_a_bug_ends_a_run_with_status_1_and_its_traceback(tmp_path: Path) -> None:
    gate, out = Gate(tmp_path / "gate", is_open=True), tmp_path / "run"
    line = command(out, INPROCESS, *gate.overrides, "objective.bug=true")
    ended = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=BOUND_S)
    assert ended.returncode == 1
    assert "KeyError: 'a bug in an objective'" in ended.stderr
    assert "gated.py" in ended.stderr
