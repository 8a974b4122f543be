"""Small trainings for tests, also in processes of their own: several ranks, or killed at a bad moment."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from blocks import ragged
from tiny import make_llama
from torch import nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from isoray.corpora.stream import BlockStream
from isoray.objectives.base import Objective
from isoray.objectives.lm import LanguageModelling
from isoray.training import state
from isoray.training.config import ComputeConfig, TrainingConfig
from isoray.training.loop import Step, train
from isoray.training.optim import AdamConfig
from isoray.training.parallel import Parallel, Ranks
from isoray.training.state import Checkpoints

FINGERPRINT = "the tiny training"
KILLS = {"data": 2, "metadata": 2, "marker": 2, "rename": 2, "removal": 4}
"""Where :func:`run_killed` may strike, and the checkpoint that must be used afterwards."""
STEPS = 8
BOUND_S = 120.0


def tiny_training(
    model: nn.Module,
    checkpoints: Checkpoints | None = None,
    *,
    strategy: str = "ddp",
    objective: Objective | None = None,
) -> Iterator[Step]:
    """A training of 8 steps with checkpoints at 2, 4 and 6."""
    config = TrainingConfig(
        steps=STEPS, batch_size=5, optimizer=AdamConfig(lr=1e-2), log_every=1, checkpoint_every=2, clip_norm=1.0
    )
    compute = ComputeConfig.model_validate({"micro_batch_rows": 2, "parallel": strategy})
    return train(
        Parallel(model, Ranks.current(), compute),
        objective or LanguageModelling(LanguageModelling.Config()),
        {"train": BlockStream([ragged("a", 12, seed=1)], batch_size=5, seed=3)},
        config,
        seed=3,
        pad_token_id=0,
        checkpoints=checkpoints,
    )


def in_processes(work: Callable[..., None], number: int, *arguments: Any) -> list[int | None]:
    """Runs ``work(rank, number, port, *arguments)`` in ``number`` processes; their exit statuses.

    They are forked from a server that has imported the heavy modules and computed nothing, which is quick and safe.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["isoray.training.state", "isoray.training.loop", "transformers.models.llama.modeling_llama"]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=work, args=(rank, number, port, *arguments)) for rank in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(BOUND_S)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"rank {processes.index(process)} was still at work after {BOUND_S} s")
    statuses = [process.exitcode for process in processes]
    assert number == 1 or set(statuses) == {0}, statuses
    return statuses


def run_ranks(rank: int, world: int, port: int, strategy: str, folder: Path) -> None:
    """All 8 steps on ``world`` ranks, then the whole weights to ``weights.pt``. The checkpoints stay."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model = make_llama(0, torch.float64)
    list(tiny_training(model, Checkpoints(folder / "checkpoints", FINGERPRINT), strategy=strategy))
    save_whole(model, rank, folder)
    dist.barrier()
    dist.destroy_process_group()


def save_whole(model: nn.Module, rank: int, folder: Path) -> None:
    """All ranks' weights to ``weights.pt``."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(whole, folder / "weights.pt")


def run_killed(kill: str, folder: Path) -> None:
    """Trains in another process, which kills itself at ``kill`` while it writes the checkpoint of step 4."""
    assert in_processes(_killed, 1, kill, folder) == [-signal.SIGKILL]


def _killed(rank: int, world: int, port: int, kill: str, folder: Path) -> None:
    torch.set_num_threads(1)
    checkpoints = Checkpoints(folder, FINGERPRINT)
    for step in tiny_training(make_llama(), checkpoints):
        if step.step == 3:  # the checkpoint of step 2 is there
            _arm(kill)


def _arm(kill: str) -> None:
    """Replaces one operation of the checkpoint's writing by one that does half of it and dies."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_half(transforms: Any, stream: Any, data: Any, *rest: Any, **options: Any) -> None:
        stream.write(b"half a tensor")
        stream.flush()
        die()

    def remove_half(path: Path, **_: Any) -> None:
        for shard in Path(path).glob("*.distcp"):
            shard.unlink()
            die()

    targets: dict[str, tuple[Any, str, Any]] = {
        "data": (filesystem, "_write_item", write_half),
        "metadata": (filesystem.FileSystemWriter, "finish", die),
        "marker": (state, "_write_text", die),
        "rename": (os, "rename", die),
        "removal": (shutil, "rmtree", remove_half),
    }
    owner, name, replacement = targets[kill]
    assert hasattr(owner, name)
    setattr(owner, name, replacement)
