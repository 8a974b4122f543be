"""The training loop: resuming is exact, checkpoints are whole or absent, something really trains."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import ListStore, packed, ragged
from pydantic import TypeAdapter, ValidationError
from tiny import make_llama
from torch import Tensor, nn
from trainings import FINGERPRINT, KILLS, in_processes, run_killed, run_ranks, tiny_training

from isoray.corpora.stream import BlockStream
from isoray.errors import InfraError, NumericError
from isoray.objectives.lm import LanguageModelling
from isoray.training.config import ComputeConfig, TrainingConfig
from isoray.training.loop import Step, train
from isoray.training.optim import OptimizerConfig, ScheduleConfig, SgdConfig, make_optimizer
from isoray.training.parallel import Parallel, Ranks
from isoray.training.state import Checkpoints

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"kind": "adam", "lr": 1e-2},
    "adamw": {"kind": "adamw", "lr": 1e-2, "weight_decay": 0.1},
    "sgd": {"kind": "sgd", "lr": 0.1},
    "momentum": {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "dampening": 0.9},
    "rmsprop": {"kind": "rmsprop", "lr": 1e-3},
    "adafactor": {"kind": "adafactor", "lr": 1e-2},
}
ROUGH: dict[str, Any] = {
    "steps": 9,
    "batch_size": 6,
    "schedule": {"kind": "cosine", "warmup_steps": 3},
    "clip_norm": 0.5,
    "log_every": 1,
    "checkpoint_every": 4,
}
"""Everything that a resumed training could get wrong, at once."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Results are the same to the last bit for the same number of threads only, and the tests' processes have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_dropout(seed: int = 0) -> nn.Module:
    model = make_llama(seed)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return model


def steps_of(
    model: nn.Module, config: TrainingConfig, checkpoints: Checkpoints | None = None, *, objective: Any = None
) -> Iterator[Step]:
    """Packed and ragged rows, several micro-batches per step."""
    rows = ragged("a", 14, seed=1).blocks
    store = ListStore("a", [*rows[:6], *(packed(rows[i : i + 2]) for i in range(6, 14, 2))])
    return train(
        Parallel(model, compute=ComputeConfig(micro_batch_rows=2)),
        objective or LanguageModelling(LanguageModelling.Config()),
        {"train": BlockStream([store], batch_size=config.batch_size, seed=5)},
        config,
        seed=5,
        pad_token_id=0,
        checkpoints=checkpoints,
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def told(steps: list[Step]) -> list[tuple[Any, ...]]:
    return [(s.step, s.loss, s.gradient_norm, s.learning_rate) for s in steps]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_training_is_the_undisturbed_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = TrainingConfig.model_validate({**ROUGH, "optimizer": OPTIMIZERS[name]})
    whole = with_dropout()
    expected = list(steps_of(whole, config))
    checkpoints = Checkpoints(tmp_path, "this one")
    broken_off = with_dropout()
    list(islice(steps_of(broken_off, config, checkpoints), 6))
    assert checkpoints.latest() == tmp_path / "step-00000004"
    torch.manual_seed(1234)  # the state of the new process's generator must not matter
    resumed = with_dropout(seed=99)
    got = list(steps_of(resumed, config, checkpoints))
    assert told(got) == told(expected)[4:]
    assert same(weights(resumed), weights(whole))
    assert not same(weights(broken_off), weights(whole))


def test_dropout_is_on_and_depends_on_the_step_alone() -> None:
    config = TrainingConfig.model_validate({**ROUGH, "optimizer": OPTIMIZERS["sgd"]})
    torch.manual_seed(1)
    one = told(list(steps_of(with_dropout(), config)))
    torch.manual_seed(2)
    assert told(list(steps_of(with_dropout(), config))) == one
    assert told(list(steps_of(make_llama(), config)))[0] != one[0]


def test_a_checkpoint_of_another_training_is_neither_used_nor_spared(tmp_path: Path) -> None:
    """An older run's later checkpoint must not push out those of the training that is going on."""
    config = TrainingConfig.model_validate({**ROUGH, "optimizer": OPTIMIZERS["adam"]})
    other = Checkpoints(tmp_path, "another")
    list(islice(steps_of(make_llama(7), config, other), 9))
    assert other.latest() == tmp_path / "step-00000008"
    own = Checkpoints(tmp_path, "this one")
    assert own.latest() is None
    list(islice(steps_of(make_llama(), config, own), 5))
    assert own.latest() == tmp_path / "step-00000004"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path: Path) -> None:
    config = TrainingConfig.model_validate({**ROUGH, "checkpoint_every": 2, "optimizer": OPTIMIZERS["adam"]})
    list(steps_of(make_llama(), config, Checkpoints(tmp_path, "", keep=2)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000008"]


@pytest.mark.chaos
@pytest.mark.parametrize(("kill", "latest"), KILLS.items())
def test_a_training_killed_while_it_writes_a_checkpoint_goes_on_from_a_whole_one(
    kill: str, latest: int, tmp_path: Path
) -> None:
    """SIGKILL at the second checkpoint; ``latest`` is the step of the one that must be used afterwards."""
    run_killed(kill, tmp_path)  # asserts that the process died of it
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left != [f"step-{latest:08d}"], "the kill left no trace: it came too early or too late"
    checkpoints = Checkpoints(tmp_path, FINGERPRINT)
    assert checkpoints.latest() == tmp_path / f"step-{latest:08d}"
    resumed, whole = make_llama(seed=99), make_llama()
    got = list(tiny_training(resumed, checkpoints))
    assert told(got) == told(list(tiny_training(whole)))[latest:]
    assert same(weights(resumed), weights(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"], "no remains are left"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_ranks_is_read_by_one(strategy: str, tmp_path: Path) -> None:
    """In float64, so that only the number of ranks' own rounding remains."""
    in_processes(run_ranks, 2, strategy, tmp_path)
    two = torch.load(tmp_path / "weights.pt")
    checkpoints = Checkpoints(tmp_path / "checkpoints", FINGERPRINT)
    assert checkpoints.latest() == tmp_path / "checkpoints" / "step-00000006"
    assert len(list((tmp_path / "checkpoints" / "step-00000006").glob("*.distcp"))) == 2
    resumed, alone = make_llama(99, torch.float64), make_llama(0, torch.float64)
    steps = list(tiny_training(resumed, checkpoints))
    assert [step.step for step in steps] == [7, 8]
    list(tiny_training(alone))
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=1e-11)
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-11)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, room for two checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk (needs root): {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.chaos
def test_a_full_disk_is_told_and_costs_no_earlier_checkpoint(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk, FINGERPRINT)
    steps = tiny_training(make_llama(), checkpoints)
    for step in steps:
        if step.step == 3:
            break
    free = os.statvfs(small_disk)
    (small_disk.parent / "filler").touch()
    with (small_disk / "filler.partial").open("wb") as filler:
        filler.write(b"x" * (free.f_bavail * free.f_frsize - 60_000))
    with pytest.raises(InfraError, match=r"checkpoint of step 4 could not be written.*[Nn]o space left") as raised:
        list(steps)
    assert raised.value.exit_status == 5
    assert "run the same command again" in str(raised.value)
    assert checkpoints.latest() == small_disk / "step-00000002"
    (small_disk / "filler.partial").unlink()
    resumed, whole = make_llama(seed=99), make_llama()
    list(tiny_training(resumed, checkpoints))
    list(tiny_training(whole))
    assert same(weights(resumed), weights(whole))


class BreaksDown(LanguageModelling):
    """The loss is NaN from step ``at`` on."""

    at = 5

    def __init__(self, config: LanguageModelling.Config) -> None:
        super().__init__(config)
        self._step = 0

    def coefficients(self, step: int) -> dict[str, float]:
        return {"nll": math.nan if step >= self.at else 1.0}


def test_broken_numbers_end_the_training_and_spare_the_last_sound_checkpoint(tmp_path: Path) -> None:
    """Also where nothing is reported between the break and the next checkpoints."""
    quiet = {**ROUGH, "clip_norm": None, "log_every": 100, "checkpoint_every": 2, "optimizer": OPTIMIZERS["adam"]}
    checkpoints = Checkpoints(tmp_path, "")
    objective = BreaksDown(LanguageModelling.Config())
    with pytest.raises(
        NumericError, match=r"step 6: the gradient's norm is nan.*the last checkpoint is kept"
    ) as raised:
        list(steps_of(make_llama(), TrainingConfig.model_validate(quiet), checkpoints, objective=objective))
    assert raised.value.exit_status == 4
    assert checkpoints.latest() == tmp_path / "step-00000004"
    model = make_llama(1)
    optimizer = make_optimizer(TrainingConfig.model_validate(quiet).optimizer, model.parameters())
    assert checkpoints.load(tmp_path / "step-00000004", model, optimizer) == 4
    assert all(torch.isfinite(tensor).all() for tensor in weights(model).values())


def test_ascent_without_end_is_a_numeric_error() -> None:
    config = TrainingConfig(steps=50, batch_size=6, optimizer=SgdConfig(lr=1e30), log_every=100)
    with pytest.raises(NumericError, match=r"optimizer\.lr"):
        list(steps_of(make_llama(), config))


def frozen() -> nn.Module:
    return make_llama().requires_grad_(False)


def dead() -> nn.Module:
    """Gradients are zero everywhere but at the embedding, which is frozen."""
    model = make_llama()
    model.lm_head.weight.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


@pytest.mark.parametrize(
    ("make_model", "lr", "message"),
    [
        (frozen, 0.1, "no parameter of the model requires a gradient"),
        (dead, 0.1, "step 1: the gradient is zero, nothing trains"),
        (make_llama, 1e-30, "step 1: no weight changed"),
    ],
)
def test_a_training_that_trains_nothing_is_refused(make_model: Any, lr: float, message: str) -> None:
    config = TrainingConfig(steps=3, batch_size=6, optimizer=SgdConfig(lr=lr))
    with pytest.raises(NumericError, match=message):
        list(steps_of(make_model(), config))


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan])
def test_a_learning_rate_that_cannot_train_is_refused(lr: float) -> None:
    with pytest.raises(ValidationError, match=r"greater than 0|Input should be"):
        SgdConfig(lr=lr)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_makes_progress(name: str) -> None:
    config = TrainingConfig.model_validate(
        {"steps": 40, "batch_size": 10, "log_every": 1, "optimizer": OPTIMIZERS[name]}
    )
    losses = [step.loss or 0.0 for step in steps_of(make_llama(), config)]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adam", lambda p: torch.optim.Adam(p, lr=1e-2)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1)),
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.9)),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=1e-3)),
    ],
)
def test_optimizers_are_those_of_their_names(name: str, reference: Any) -> None:
    config: Any = TypeAdapter(OptimizerConfig).validate_python(OPTIMIZERS[name])
    ours, theirs = make_llama(), make_llama()
    for model, optimizer in (
        (ours, make_optimizer(config, ours.parameters())),
        (theirs, reference(theirs.parameters())),
    ):
        for step in range(5):
            ids = torch.arange(3, 19).reshape(2, 8) + step
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, tensor in weights(theirs).items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"kind": "constant"}, [1.0] * 8),
        ({"kind": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"kind": "linear"}, [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ({"kind": "linear", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ({"kind": "linear", "final": 0.2}, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ({"kind": "cosine", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 0.853553390593, 0.5, 0.146446609407]),
        ({"kind": "cosine", "warmup_steps": 9}, [step / 9 for step in range(1, 9)]),
    ],
)
def test_schedules_are_as_written_out(settings: dict[str, Any], factors: list[float]) -> None:
    """The rates that the loop really used, over the first one's factor."""
    config = TrainingConfig(
        steps=8, batch_size=6, log_every=1, optimizer=SgdConfig(lr=0.25), schedule=ScheduleConfig(**settings)
    )
    rates = [step.learning_rate for step in steps_of(make_llama(), config)]
    assert rates == pytest.approx([0.25 * factor for factor in factors], abs=1e-12)


def test_without_a_process_group_there_is_one_rank() -> None:
    assert Ranks.current() == Ranks(0, 1, torch.device("cpu"))


def test_a_checkpoint_says_whose_it_is(tmp_path: Path) -> None:
    list(islice(tiny_training(make_llama(), Checkpoints(tmp_path, FINGERPRINT)), 3))
    assert json.loads((tmp_path / "step-00000002" / "training.json").read_text()) == {
        "step": 2,
        "fingerprint": FINGERPRINT,
    }
