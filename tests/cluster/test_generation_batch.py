"""Generation for a table of prompts: in this process, on a Ray of several engines, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from generation_models import small_model

from isoray.cluster import connect
from isoray.config.load import load
from isoray.errors import DataError, UserError
from isoray.generation.batch import AnswerShard, answer_missing, missing_shards, read_completions, stage_prompts
from isoray.generation.contrast import ContrastConfig
from isoray.generation.prompts import PromptsConfig, inputs_of
from isoray.generation.sampling import SamplingConfig, seed_of
from isoray.generation.transformers import TransformersEngine
from isoray.recipes.generate import Generate
from isoray.run import Run

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
PROMPTS = 1000
BOUND_S = 240


@pytest.fixture(scope="module")
def contrast(tmp_path_factory: pytest.TempPathFactory) -> ContrastConfig:
    folder = tmp_path_factory.mktemp("models")
    return ContrastConfig(positive=str(small_model(folder / "p", 0)), negative=str(small_model(folder / "n", 1)))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand prompts of mixed length with a column of their own; the 13th of every hundred is too long."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    words = "one two three four five six seven eight nine ten".split()
    with path.open("w") as file:
        for number in range(PROMPTS):
            count = 200 if number % 100 == 13 else 1 + number % 7
            prompt = " ".join(words[(number + i) % 10] for i in range(count))
            file.write(json.dumps({"question": prompt, "group": f"g{number % 3}"}) + "\n")
    return path


def overrides(contrast: ContrastConfig, table: Path) -> list[str]:
    return [
        f"contrast.positive={contrast.positive}",
        f"contrast.negative={contrast.negative}",
        f"prompts.path={table}",
        "prompts.column=question",
        "prompts.repeat=1",
        "sampling.max_tokens=10",
        "engine.slots=25",
        "shard_size=50",
        "scaling.lanes=2",
        "scaling.cpus_per_worker=1",
    ]


def command(out: Path, *changes: str) -> list[str]:
    config = str(ROOT / "configs" / "generate" / "continuations.yaml")
    return [sys.executable, "-m", "isoray.cli", "run", config, *changes, "--out", str(out)]


def shards_in(out: Path) -> dict[str, tuple[int, int]]:
    """The shards of completions that are there: their file's identity and time."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in (out / "completions").glob("shard-*.parquet")
    }


@pytest.mark.chaos
@pytest.mark.slow
def test_a_killed_run_goes_on_and_answers_each_prompt_once(
    contrast: ContrastConfig, table: Path, tmp_path: Path
) -> None:
    changes, out = overrides(contrast, table), tmp_path / "killed"
    process = subprocess.Popen(command(out, *changes), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    family = psutil.Process(process.pid)
    deadline = time.monotonic() + BOUND_S
    while len(shards_in(out)) < 6:
        assert process.poll() is None and time.monotonic() < deadline, "it is at work until it is killed"
        time.sleep(0.02)
    members = family.children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(members, timeout=60)
    before = shards_in(out)
    assert 6 <= len(before) < PROMPTS // 50, "the kill came half-way"

    again = subprocess.run(command(out, *changes), capture_output=True, text=True, timeout=BOUND_S)
    assert again.returncode == 0, again.stderr
    after = shards_in(out)
    assert len(after) == PROMPTS // 50
    assert {name: after[name] for name in before} == before, "nothing that was finished was done again"

    whole = tmp_path / "whole"
    undisturbed = subprocess.run(
        command(whole, *changes, "scaling.executor=inprocess", "scaling.lanes=1"),
        capture_output=True,
        text=True,
        timeout=BOUND_S,
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    completions = read_completions(out)
    assert completions.column("index").to_pylist() == list(range(PROMPTS))
    assert completions.equals(read_completions(whole))
    assert metrics(out) == metrics(whole)
    failed = [row for row in completions.to_pylist() if row["error"]]
    assert [row["index"] for row in failed] == list(range(13, PROMPTS, 100))
    assert all("request " + str(row["index"]) in row["error"] and row["finish"] == "error" for row in failed)
    assert completions.column("group").to_pylist()[:4] == ["g0", "g1", "g2", "g0"]
    assert completions.column("seed").to_pylist()[5] == seed_of(42, 5)


def metrics(out: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((out / "results.json").read_text())["metrics"]
    return found


def test_a_dead_engine_is_replaced(contrast: ContrastConfig, tmp_path: Path) -> None:
    """A worker that is killed while it answers a shard; another answers it."""
    prompts = [{"prompt": "one two three"} for _ in range(12)]
    shards = stage_prompts(prompts, tmp_path, shard_size=4, inputs="x")
    flag = tmp_path / "killed"

    def work(missing: tuple[int, ...]) -> AnswerShard:
        sampling, engine = SamplingConfig(max_tokens=4), TransformersEngine.Config()
        return _DiesOnce(engine, contrast, sampling, tmp_path, 0, missing, flag=str(flag))

    with connect(cores=2):
        last = list(answer_missing(work, tmp_path, shards, executor="ray", engines=1))[-1]
    assert flag.exists(), "the worker was killed"
    assert (last.done, last.prompts, last.failed) == (3, 12, 0)
    assert read_completions(tmp_path).column("index").to_pylist() == list(range(12))


class _DiesOnce(AnswerShard):
    def __init__(self, *args: object, flag: str) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.flag = flag

    def __call__(self, item: int) -> str:
        if item == 1 and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(item)


def test_prompts_of_a_ray_dataset(contrast: ContrastConfig, tmp_path: Path) -> None:
    import ray.data

    with connect(cores=2):
        rows = [{"prompt": f"one two {number}", "number": number} for number in range(10)]
        dataset = ray.data.from_items(rows, override_num_blocks=3)
        shards = stage_prompts(dataset, tmp_path, shard_size=4, inputs="a dataset")
    assert shards == 3 and missing_shards(tmp_path, 3) == [0, 1, 2]
    assert pq.read_table(tmp_path / "prompts" / "shard-000000.parquet").num_rows == 4
    engine = TransformersEngine.Config()

    def work(missing: tuple[int, ...]) -> AnswerShard:
        return AnswerShard(engine, contrast, SamplingConfig(max_tokens=3), tmp_path, 7, missing)

    progress = list(answer_missing(work, tmp_path, shards, executor="inprocess"))
    assert [one.done for one in progress] == [1, 2, 3]
    assert progress[-1].tokens_per_second > 0 and progress[-1].tokens == sum(
        len(tokens) for tokens in read_completions(tmp_path).column("token_ids").to_pylist()
    )
    assert read_completions(tmp_path).column("number").to_pylist() == list(range(10))
    assert not list(answer_missing(work, tmp_path, shards, executor="inprocess")), "nothing is left to do"
    assert stage_prompts(iter(()), tmp_path, shard_size=4, inputs="a dataset") == 3, "they are staged already"
    stage_prompts(rows[:2], tmp_path, shard_size=4, inputs="others")
    assert missing_shards(tmp_path, 1) == [0], "other prompts need other completions"


def test_prompts_that_have_changed_on_disk_are_other_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n")
    config = PromptsConfig(path=str(path))
    before = inputs_of(config)
    assert inputs_of(config) == before
    path.write_text("one\ntwo\n")
    assert inputs_of(config) != before


def test_bad_prompts_and_models_are_told_before_anything_starts(
    contrast: ContrastConfig, table: Path, tmp_path: Path
) -> None:
    for rows, words in (
        ([{"text": "x"}], "row 0 of the prompts has no `prompt`; it has 'text'"),
        ([{"prompt": "x"}, {"prompt": "x", "seed": 1}], "row 1 of the prompts has a column 'seed'"),
        ([], "there are no prompts"),
    ):
        with pytest.raises(DataError, match=words):
            stage_prompts(rows, tmp_path / "staged", shard_size=4, inputs=words)

    def run(*changes: str) -> None:
        base = overrides(contrast, table)
        here = ["scaling.executor=inprocess", "scaling.lanes=1"]
        config = load(ROOT / "configs" / "generate" / "continuations.yaml", [*base, *here, *changes]).config
        assert isinstance(config, Generate.Config)
        with Run.open(tmp_path / "run", config, recipe="generate") as opened:
            Generate(config).run(opened)

    with pytest.raises(DataError, match=r"prompts.jsonl.*no column 'nowhere'.*question, group"):
        run("prompts.column=nowhere")
    with pytest.raises(DataError, match="holds no prompts with"):
        run("prompts.where={group: g9}")
    empty = tmp_path / "empty"
    small_model(empty, 0)
    (empty / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"contrast\.negative: .* has a config.json but no \*.safetensors"):
        run(f"contrast.negative={empty}")
    with pytest.raises(DataError, match="10 of 1000 prompts could not be answered, the first: request 13: "):
        run("max_failed=0.001", "sampling.max_tokens=1")
