"""Building stores with Ray Data: the same bytes as in one process, errors as they were told, lost workers replaced."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from toy_tokenizer import save_byte_tokenizer

from isoray.corpora import assemble, splits
from isoray.corpora.build import build
from isoray.corpora.config import CorporaConfig
from isoray.corpora.execute import carry_out
from isoray.errors import DataError, InfraError, IsorayError

pytestmark = pytest.mark.cluster

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import this file


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        object_store_memory=100 * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


def write_corpus(folder: Path, rows: int, *, bad_row: int | None = None) -> None:
    lines = [json.dumps({"text": f"document {i} " + "lorem ipsum " * (i % 13)}) for i in range(rows)]
    if bad_row is not None:
        lines[bad_row] = '{"text": "half'
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")


def make(folder: Path, out: str, executor: Any, **corpus: Any) -> Any:
    config = CorporaConfig.model_validate(
        {"root": str(folder), "train": {"a": {"path": "a.jsonl", **corpus}, "b": {"path": "a.jsonl", "limit": 50}}}
    )
    seen: list[tuple[str, int, int]] = []
    tokenizer = save_byte_tokenizer(folder / "tokenizer")
    stores = build(
        config, tokenizer, folder / out, executor=executor, workers=2, progress=lambda *told: seen.append(told)
    ).train
    return stores, seen


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits.plan_tasks, "__kwdefaults__", {"task_bytes": 4000})
    monkeypatch.setattr(assemble, "WINDOW_TOKENS", 10_000)


def test_ray_and_one_process_write_the_same_bytes(tmp_path: Path) -> None:
    write_corpus(tmp_path, 500)
    here, _ = make(tmp_path, "here", "inprocess")
    there, seen = make(tmp_path, "there", "ray")
    assert [store.manifest for store in here] == [store.manifest for store in there]
    assert len(here[0].manifest.shards) > 2
    for one, other in zip(here, there, strict=True):
        files = [path.relative_to(one.folder) for path in one.folder.rglob("*") if path.is_file()]
        assert len(files) >= 7
        for name in files:
            assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
    phases = {phase: [told[1:] for told in seen if told[0] == phase] for phase, *_ in seen}
    for counts in phases.values():
        total = counts[0][1]
        assert counts == [(done, total) for done in range(1, total + 1)]
    assert phases["tokenise"][0][1] > 10


def test_bad_rows_stop_the_build_with_file_and_line(tmp_path: Path) -> None:
    write_corpus(tmp_path, 300, bad_row=222)
    with pytest.raises(DataError, match=r"a\.jsonl, line 223: not JSON"):
        make(tmp_path, "out", "ray")


@dataclass
class Suicide:
    """Item 3 kills its own worker the first time."""

    folder: Path

    def __call__(self, item: int) -> str:
        marker = self.folder / "killed"
        if item == 3 and not marker.exists():
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return f"{item} by {os.getpid()}"


def test_the_work_of_a_killed_worker_is_done_again(tmp_path: Path) -> None:
    results = carry_out(Suicide(tmp_path), 6, phase="test", executor="ray", workers=2)
    killed = (tmp_path / "killed").read_text()
    assert [result.split()[0] for result in results] == ["0", "1", "2", "3", "4", "5"]
    assert killed not in {result.split()[2] for result in results if result.startswith("3")}


@dataclass
class Fails:
    """Item 1 raises."""

    error: Exception

    def __call__(self, item: int) -> str:
        if item == 1:
            raise self.error
        return ""


def test_errors_are_raised_as_they_were_told() -> None:
    with pytest.raises(InfraError, match=r"^storage is away$"):
        carry_out(Fails(InfraError("storage is away")), 3, phase="test", executor="ray", workers=1)
    with pytest.raises(Exception, match="a bug") as caught:
        carry_out(Fails(ZeroDivisionError("a bug")), 3, phase="test", executor="ray", workers=1)
    assert not isinstance(caught.value, IsorayError)
