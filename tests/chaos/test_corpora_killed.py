"""A driver that is killed while it builds a store: the next one goes on, and the store is the undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_tokenizer import save_byte_tokenizer

from isoray.corpora import documents, splits
from isoray.corpora.build import build
from isoray.corpora.config import CorporaConfig

pytestmark = pytest.mark.chaos

TASK_BYTES = 150_000
DRIVER = """
import json, sys
from isoray.corpora import splits
from isoray.corpora.build import build
from isoray.corpora.config import CorporaConfig
splits.plan_tasks.__kwdefaults__["task_bytes"] = int(sys.argv[1])
build(CorporaConfig.model_validate(json.loads(sys.argv[2])), sys.argv[3], sys.argv[4], executor="inprocess")
"""


def test_a_killed_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    (tmp_path / "input").mkdir()
    for number in range(20):
        rows = [{"text": "".join(draw.choices("abcde ", k=1000))} for _ in range(TASK_BYTES // 1000)]
        (tmp_path / "input" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = save_byte_tokenizer(tmp_path / "tokenizer")
    raw = {"root": str(tmp_path), "train": {"c": {"path": "input"}}, "length": 128}
    out = tmp_path / "out"
    arguments = [str(TASK_BYTES), json.dumps(raw), str(tokenizer), str(out)]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments])
    deadline = time.monotonic() + 120
    while len(list(out.glob("*/documents/task-*"))) < 3:
        assert driver.poll() is None and time.monotonic() < deadline, "the driver ended before it could be killed"
        time.sleep(0.002)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    done = list(out.glob("*/documents/task-*/report.json"))
    assert 3 <= len(done) < 20 and not list(out.glob("*/manifest.json"))

    monkeypatch.setitem(splits.plan_tasks.__kwdefaults__, "task_bytes", TASK_BYTES)
    config = CorporaConfig.model_validate(raw)
    again: list[int] = []
    original = documents.read_task_report

    def read_task_report(plan: documents.CorpusPlan, number: int) -> documents.TaskReport:
        again.append(number)
        return original(plan, number)

    monkeypatch.setattr(documents, "read_task_report", read_task_report)
    (store,) = build(config, tokenizer, out, executor="inprocess").train
    (undisturbed,) = build(config, tokenizer, tmp_path / "undisturbed", executor="inprocess").train
    assert len(again) == len(done), "finished tasks are read, not done again"
    assert store.manifest == undisturbed.manifest
    assert [path.name for path in store.folder.iterdir() if path.name.startswith(".")] == []
    store.verify()
