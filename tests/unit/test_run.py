"""A run folder: steps that are skipped when done, one process at a time, files that are whole or absent."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isoray.config.base import Config
from isoray.errors import InfraError, UserError
from isoray.linking import LINK_BYTES
from isoray.run import Run, StopEarly, read_step, to_json, write_json


class Settings(Config):
    seed: int = 3
    size: int = 1


def opened(folder: Path, **settings: int) -> Run:
    return Run.open(folder, Settings(**settings), recipe="toy")


def test_a_step_is_done_once_for_the_same_inputs(tmp_path: Path) -> None:
    calls = []

    def work(folder: Path) -> object:
        calls.append(folder)
        (folder / "data.txt").write_text("x")
        return {"pair": (1, 2.5), "array": np.arange(2), "nan": math.nan}

    with opened(tmp_path / "run") as run:
        first = run.step("count", {"n": 1}, work)
        assert not calls[0].exists()  # renamed
        assert (run.step_folder("count") / "data.txt").read_text() == "x"
    with opened(tmp_path / "run") as run:
        assert run.is_done("count", {"n": 1}) and not run.is_done("count", {"n": 2})
        again = run.step("count", {"n": 1}, work)
        assert len(calls) == 1
        assert first["pair"] == again["pair"] == [1, 2.5] and first["array"] == again["array"] == [0, 1]
        assert math.isnan(again["nan"])
        run.step("count", {"n": 2}, work)
        assert len(calls) == 2
    marker = read_step(tmp_path / "run/steps/count")
    assert marker is not None and marker["seconds"] >= 0


def test_a_step_that_broke_off_starts_empty_unless_resumable(tmp_path: Path) -> None:
    def breaks(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("broke off")

    def seen(folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir() if path.name != "inputs.json")

    with opened(tmp_path) as run:
        for name, resumable, found in (("fresh", False, []), ("goes_on", True, ["half"])):
            with pytest.raises(RuntimeError, match="broke off"):
                run.step(name, 1, breaks, resumable=resumable)
            assert not run.is_done(name, 1)
            assert run.step(name, 1, seen, resumable=resumable) == found
        with pytest.raises(RuntimeError):
            run.step("other_inputs", 1, breaks, resumable=True)
        assert run.step("other_inputs", 2, seen, resumable=True) == []


def test_a_step_without_its_marker_is_done_again(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        assert run.step("a", 1, lambda _: "first") == "first"
        (run.step_folder("a") / "step.json").write_text('{"inputs": "')
        assert run.step("a", 1, lambda _: "second") == "second"


def test_another_config_keeps_steps_and_drops_results(tmp_path: Path) -> None:
    with opened(tmp_path, size=1) as run:
        run.step("a", 1, lambda _: "kept")
        run.finish(metrics={"m": 1.0}, tables={})
    (tmp_path / "report.html").write_text("old")
    with opened(tmp_path, size=1):
        assert (tmp_path / "results.json").exists() and (tmp_path / "report.html").exists()
    with opened(tmp_path, size=2) as run:
        assert not (tmp_path / "results.json").exists() and not (tmp_path / "report.html").exists()
        assert run.step("a", 1, lambda _: "done again") == "kept"
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "config_digest": Settings(size=2).digest(),
        "seed": 3,
        "size": 2,
    }


def test_results_follow_the_contract(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.finish(
            metrics={"a": np.float32(0.5), "b": math.nan},
            tables={"t": [{"x": np.int64(1), "y": math.inf}]},
            artifacts={"model": run.folder / "checkpoints" / "all"},
        )
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    keys = "recipe config_digest seed started seconds environment metrics tables artifacts lineage".split()
    assert list(results) == keys
    assert (results["recipe"], results["seed"], results["config_digest"]) == ("toy", 3, Settings().digest())
    assert results["metrics"] == {"a": 0.5, "b": None}
    assert results["tables"] == {"t": [{"x": 1, "y": None}]}
    assert results["artifacts"] == {"model": "checkpoints/all"}


def test_metrics_are_whole_lines_also_after_a_kill(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.log(job="a", loss=np.float64(1.5), bad=math.nan)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"job": "torn", "lo')
    with opened(tmp_path) as run:
        run.log(job="b")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"job": "a", "loss": 1.5, "bad": None}, {"job": "b"}]


HOLDER = """
import sys, time
from isoray.run import Run
sys.path.insert(0, sys.argv[2])
from test_run import Settings
run = Run.open(sys.argv[1], Settings(), recipe="toy")
print("open", flush=True)
time.sleep(600)
"""


def test_one_process_at_a_time_and_a_dead_one_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "open\n"
            with pytest.raises(UserError, match=f"in use by process {holder.pid} on "):
                opened(folder)
        finally:
            holder.send_signal(signal.SIGKILL)
    with opened(folder):
        pass


def test_folders_that_are_no_run_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        opened(tmp_path / "file")
    with pytest.raises(UserError, match="holds other files and no run"):
        opened(tmp_path / "home")
    with pytest.raises(UserError, match="not a URI"):
        Run.open("s3://bucket/run", Settings(), recipe="toy")
    assert (tmp_path / "home").exists() and not (tmp_path / "home/steps").exists()


def test_a_full_disk_is_infrastructure_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"old": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InfraError, match=r"cannot write .*a\.json: No space left"):
        write_json(tmp_path / "a.json", {"new": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_in_a_step_is_infrastructure(tmp_path: Path) -> None:
    def fill(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(tmp_path) as run, pytest.raises(InfraError, match="run the same command again"):
        run.step("a", 1, fill)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.1), float(np.float32(0.1))),
        (np.array([[1, 2]]), [[1, 2]]),
        ({1: {2, 1}}, {"1": [1, 2]}),
        (Path("a/b"), "a/b"),
        (Settings(), {"seed": 3, "size": 1}),
        (np.bool_(True), True),
        (True, True),
    ],
)
def test_values_become_json_types(value: Any, plain: Any) -> None:
    assert to_json(value) == plain
    json.dumps(to_json(value))


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        to_json({"a": object()})


def test_reports_are_rows_and_reach_the_reporter_which_may_end_the_run(tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, float]]] = []

    def reporter(step: int, metrics: Mapping[str, float]) -> None:
        seen.append((step, dict(metrics)))
        if step == 2:
            raise StopEarly

    with Run.open(tmp_path, Settings(), recipe="toy", reporter=reporter) as run:
        run.report(1, loss=0.5)
        with pytest.raises(StopEarly):
            run.report(2, loss=math.nan)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    assert [step for step, _ in seen] == [1, 2] and not issubclass(StopEarly, Exception)
    with opened(tmp_path) as run:
        run.report(3, loss=1.0)


def weighty(folder: Path) -> str:
    (folder / "deep").mkdir()
    (folder / "deep" / "weights.bin").write_bytes(b"w" * LINK_BYTES)
    (folder / "log.jsonl").write_text("x" * LINK_BYTES)
    (folder / "small.bin").write_bytes(b"s")
    return "first"


def reusing(folder: Path, *others: Path) -> Run:
    return Run.open(folder, Settings(size=2), recipe="toy", reuse=others)


def test_a_finished_step_of_another_run_is_taken_over(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as run:
        run.step("prepare", 1, weighty)
    with reusing(tmp_path / "b", tmp_path / "absent", tmp_path / "b", tmp_path / "a") as run:
        assert run.step("prepare", 2, lambda _: "own") == "own", "other inputs"
        assert run.is_done("prepare", 1) and not run.is_done("prepare", 3)
        assert run.step("prepare", 1, pytest.fail) == "first"
        ours, theirs = run.step_folder("prepare"), tmp_path / "a/steps/prepare"
        assert read_step(ours) == read_step(theirs)
        shared = {
            f for f in ("deep/weights.bin", "log.jsonl", "small.bin", "step.json") if (ours / f).samefile(theirs / f)
        }
        assert shared == {"deep/weights.bin"}, "nothing that could be appended to is shared"
        assert [path.name for path in (run.folder / "steps").iterdir()] == ["prepare"]
    shutil.rmtree(tmp_path / "a")
    assert (ours / "deep/weights.bin").read_bytes() == b"w" * LINK_BYTES
    with reusing(tmp_path / "b") as run:
        assert run.step("prepare", 1, pytest.fail) == "first"


def test_files_are_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path / "a") as run:
        run.step("prepare", 1, weighty)

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    with reusing(tmp_path / "b", tmp_path / "a") as run:
        assert run.step("prepare", 1, pytest.fail) == "first"
        ours = run.step_folder("prepare") / "deep/weights.bin"
    assert ours.read_bytes() == b"w" * LINK_BYTES
    assert not ours.samefile(tmp_path / "a/steps/prepare/deep/weights.bin")


def test_half_a_step_of_another_run_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(folder: Path) -> None:
        weighty(folder)
        raise RuntimeError("broke off")

    with opened(tmp_path / "a") as run, pytest.raises(RuntimeError):
        run.step("prepare", 1, breaks)
    with reusing(tmp_path / "b", tmp_path / "a") as run:
        assert run.step("prepare", 1, lambda _: "own") == "own"

    with opened(tmp_path / "c") as run:
        run.step("prepare", 1, weighty)
    link = os.link

    def replaced_meanwhile(source: Path, target: Path) -> None:
        link(source, target)
        (tmp_path / "c/steps/prepare/step.json").unlink()

    monkeypatch.setattr(os, "link", replaced_meanwhile)
    with reusing(tmp_path / "d", tmp_path / "c") as run:
        assert run.step("prepare", 1, lambda _: "own") == "own"
        assert sorted(path.name for path in run.step_folder("prepare").iterdir()) == ["step.json"]
        assert [path.name for path in (run.folder / "steps").iterdir()] == ["prepare"]
