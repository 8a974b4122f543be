"""Resumable state of a training: sharded, atomic checkpoints that are complete or do not exist.

A checkpoint is a folder ``step-00000010`` written by ``torch.distributed.checkpoint`` (each rank its own shards, so it
can be read again by another number of workers). It is written beside its final name and renamed when all ranks have
finished; a folder under its final name, with its marker in it, is therefore complete. These folders are private to a
run: models are handed on as Transformers folders.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from isoray.errors import InfraError
from isoray.training.parallel import Ranks

_MARKER = "training.json"
"""Written last and removed first; says whose checkpoint this is."""
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoints:
    """Where a training keeps its checkpoints, and what they must belong to."""

    folder: Path
    fingerprint: str
    """Identifies the training (data order, settings, starting weights): checkpoints of another one are not used."""
    keep: int = 1

    def latest(self) -> Path | None:
        """The newest complete checkpoint of this training."""
        own = self._own()
        return own[-1] if own else None

    def save(self, model: nn.Module, optimizer: Optimizer, *, step: int, ranks: Ranks) -> Path:
        """Write the state after ``step`` optimizer steps; all ranks call it.

        Raises InfraError when the storage refuses (full, read-only); earlier checkpoints stay as they are.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f"step-{step:08d}.partial"
        try:
            if ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            ranks.barrier()
            _write(partial, model, optimizer)
            ranks.barrier()
            if ranks.rank == 0:
                _write_text(partial / _MARKER, json.dumps({"step": step, "fingerprint": self.fingerprint}))
                _remove(final)
                os.rename(partial, final)
                # Also those of another training, and what a kill left half written or half removed.
                for other in set(self.folder.iterdir()) - set(self._own()[-self.keep :]):
                    _remove(other)
            ranks.barrier()
        except (OSError, CheckpointException) as error:
            if ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise InfraError(
                f"checkpoint of step {step} could not be written to {self.folder}: {_cause(error)}. Earlier "
                "checkpoints are untouched; free space or choose another storage.path, then run the same command again."
            ) from error
        return final

    def load(self, path: Path, model: nn.Module, optimizer: Optimizer) -> int:
        """Restore model and optimizer in place from ``path``; the number of optimizer steps already taken."""
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        with _quiet():
            load(state, checkpoint_id=str(path), no_dist=not dist.is_initialized())
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return int(json.loads((path / _MARKER).read_text())["step"])

    def clear(self) -> None:
        """Remove all checkpoints: the training is finished and its result is saved elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _own(self) -> list[Path]:
        """The complete checkpoints of this training, oldest first."""
        if not self.folder.is_dir():
            return []
        named = sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
        return [path for path in named if _read_fingerprint(path) == self.fingerprint]


def _read_fingerprint(path: Path) -> str | None:
    """Whose checkpoint this is; None when it is not complete."""
    try:
        return str(json.loads((path / _MARKER).read_text())["fingerprint"])
    except FileNotFoundError:  # its removal was cut short
        return None


def _remove(path: Path) -> None:
    """Remove a checkpoint, its marker first: half a checkpoint must not look like one."""
    (path / _MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _write(partial: Path, model: nn.Module, optimizer: Optimizer) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    with _quiet():
        save(state, storage_writer=FileSystemWriter(partial, sync_files=True), no_dist=not dist.is_initialized())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remark that a single process is a single process."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _cause(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if failures:
        return "; ".join(str(cause[0]) for cause in failures.values())
    return str(error)
