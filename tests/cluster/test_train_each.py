"""Trainings of different models side by side, each a Ray task: the same weights, whole errors, lost workers resumed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gated import Gated
from launched import Mortal
from safetensors.torch import load_file
from unidetox_runs import write_rows
from untrac_runs import BOUND_S, Gate, gone, wait_until

from isoray.cluster import Cluster, connect
from isoray.config.base import Component, Config
from isoray.corpora.build import build
from isoray.corpora.config import CorporaConfig
from isoray.errors import InfraError, NumericError
from isoray.models.config import CreateConfig, LoadOptions, ModelConfig, TokenizerConfig
from isoray.models.load import prepare
from isoray.run import Run
from isoray.scaling import ScalingConfig, local_resources
from isoray.training.config import ComputeConfig, TrainingConfig
from isoray.training.phases import Trained
from isoray.workshop import Training, Workshop

pytestmark = pytest.mark.cluster

TEXTS = [f"{first} {second} {third}" for first in ("one", "two") for second in ("six", "ten") for third in ("a", "b")]
SETTINGS = TrainingConfig(steps=8, batch_size=4, log_every=1, checkpoint_every=2)
HERE = {"executor": "inprocess", "cpus_per_worker": 1}
SIDE_BY_SIDE = {"lanes": 2, "cpus_per_worker": 1}


@pytest.fixture(scope="module")
def ray() -> Iterator[Cluster]:
    with connect(cores=2) as cluster:
        yield cluster


class Settings(Config):
    """A run's config."""

    seed: int = 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Training]:
    """Two architectures, each with a tokenizer and a corpus of its own."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for number, kind in enumerate(("llama", "gpt2")):
        create = CreateConfig(
            architecture=kind,
            hidden_size=16,
            layers=1,
            heads=2,
            context=32,
            tokenizer=TokenizerConfig(vocab_size=512 + 8 * number),
        )
        start = prepare(ModelConfig(create=create), folder / kind, TEXTS * 4, seed=number)
        write_rows(folder / f"{kind}.jsonl", [{"text": text} for text in TEXTS[number:]])
        corpora = {"root": str(folder), "length": 16, "packing": False, "train": {kind: {"path": f"{kind}.jsonl"}}}
        config = CorporaConfig.model_validate(corpora)
        stores = build(config, start, folder / "corpora", executor="inprocess").train
        found[kind] = Training(start, LoadOptions(), {"train": stores}, SETTINGS)
    return found


def train(out: Path, trainings: dict[str, Training], cluster: Cluster | None, **scaling: Any) -> dict[str, Trained]:
    config = ScalingConfig.model_validate((HERE if cluster is None else SIDE_BY_SIDE) | scaling)
    resources = local_resources() if cluster is None else cluster.resources()
    with Run.open(out, Settings(), recipe="test") as run:
        shop = Workshop(run, resources, scaling=config, compute=ComputeConfig(), seed=3)
        assert cluster is None or shop.trainings(len(trainings)).lanes == 2, "side by side"
        return shop.train("trainings", trainings)


@pytest.fixture(scope="module")
def alone(models: dict[str, Training], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """One after the other, in this process."""
    return train(tmp_path_factory.mktemp("alone") / "run", models, None)


def weights(trained: Trained) -> dict[str, bytes]:
    found = load_file(trained.model / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def with_objective(training: Training, objective: Component.Config) -> Training:
    return Training(training.start, training.options, training.corpora, training.training, objective)


def gated(training: Training, gate: Gate, **harm: bool) -> Training:
    """Language modelling that stops before step 6."""
    return with_objective(training, Gated.Config(gate=str(gate.folder), **harm))


def test_side_by_side_gives_the_same_weights(
    ray: Cluster, models: dict[str, Training], alone: dict[str, Trained], tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    names = {f"{kind}-gated": gated(training, gate) for kind, training in models.items()}
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(train, tmp_path / "run", names, ray)
        arrived = gate.wait_for(number=2)
        gate.open()
        found = running.result(BOUND_S)
    assert os.getpid() not in arrived, "both were under way at one time, in processes of their own"
    for kind, one in alone.items():
        assert weights(found[f"{kind}-gated"]) == weights(one)
        assert [row["loss"] for row in found[f"{kind}-gated"].log] == [row["loss"] for row in one.log]
    assert not list((tmp_path / "run" / "steps").glob("*/checkpoints/step-*")), "they are not needed any more"


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("harm", "error"), [({"nan": True}, NumericError), pytest.param({"bug": True}, KeyError, marks=pytest.mark.slow)]
)
def test_the_error_of_one_comes_out_when_the_other_is_done(
    ray: Cluster,
    models: dict[str, Training],
    alone: dict[str, Trained],
    tmp_path: Path,
    harm: dict[str, bool],
    error: type[Exception],
) -> None:
    """The one that fails is first: the other is still on its way then."""
    stands, falls = Gate(tmp_path / "stands"), Gate(tmp_path / "falls")
    both = {"llama": gated(models["llama"], falls, **harm), "gpt2": gated(models["gpt2"], stands)}
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(train, tmp_path / "run", both, ray)
        falls.wait_for()
        stands.wait_for()
        falls.open()
        assert not running.done(), "the other is still at its gate"
        stands.open()
        with pytest.raises(error) as raised:
            running.result(BOUND_S)
    assert "objectives" in str(raised.value.__cause__) or "training" in str(raised.value.__cause__)
    assert (tmp_path / "run/steps/gpt2/step.json").exists() and not (tmp_path / "run/steps/llama").exists()
    mended = {"llama": models["llama"], "gpt2": both["gpt2"]}
    found = train(tmp_path / "run", mended, ray)
    assert found["gpt2"].reused and not found["llama"].reused
    assert {name: weights(one) for name, one in found.items()} == {name: weights(one) for name, one in alone.items()}


@pytest.mark.chaos
def test_a_lost_worker_goes_on_from_its_checkpoint(
    ray: Cluster, models: dict[str, Training], alone: dict[str, Trained], tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    both = {"llama": gated(models["llama"], gate), "gpt2": models["gpt2"]}
    partial = tmp_path / "run/steps/.llama.partial"
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(train, tmp_path / "run", both, ray)
        (victim,) = gate.wait_for()
        assert [path.name for path in (partial / "checkpoints").iterdir()] == ["step-00000004"]
        before = (partial / "metrics.jsonl").read_text()
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: gone(victim), "the victim is gone")
        (second,) = gate.wait_for(victim)
        gate.open()
        found = running.result(BOUND_S)
    assert second != victim
    assert {name: weights(one) for name, one in found.items()} == {name: weights(one) for name, one in alone.items()}
    lines = (found["llama"].model.parent / "metrics.jsonl").read_text().splitlines()
    assert lines[: len(before.splitlines())] == before.splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8], "nothing but the step after the checkpoint was done twice"


@pytest.mark.chaos
@pytest.mark.slow
def test_a_worker_that_always_dies_ends_in_a_named_error(
    ray: Cluster, models: dict[str, Training], tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    dying = with_objective(models["llama"], Mortal.Config(marks=str(marks)))
    both = {"llama": dying, "gpt2": models["gpt2"]}
    started = time.monotonic()
    with pytest.raises(InfraError, match=r"'llama' lost its worker more than scaling.max_failures = 1 times") as raised:
        train(tmp_path / "run", both, ray, max_failures=1)
    assert time.monotonic() - started < BOUND_S and "Run the same command again" in str(raised.value)
    assert len(list(marks.iterdir())) == 2, "it was tried twice"
    assert (tmp_path / "run/steps/gpt2/step.json").exists()


def test_trainings_one_after_the_other_are_the_same(
    models: dict[str, Training], alone: dict[str, Trained], tmp_path: Path
) -> None:
    turned = dict(reversed(models.items()))
    found = train(tmp_path / "run", turned, None)
    assert list(found) == ["gpt2", "llama"]
    assert {name: weights(one) for name, one in found.items()} == {name: weights(one) for name, one in alone.items()}
