"""From a model folder to a trained model folder: what a launched training does on each of its workers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from isoray.config.base import Component, digest_of
from isoray.corpora.store import BlockStore
from isoray.corpora.stream import BlockStream, PoissonStream
from isoray.models.config import LoadOptions
from isoray.models.load import LoadedModel, load, save
from isoray.objectives.base import Objective
from isoray.training.config import ComputeConfig, TrainingConfig
from isoray.training.loop import Evaluator, Step, train
from isoray.training.parallel import Parallel, Ranks
from isoray.training.privacy import account_for, write_privacy
from isoray.training.state import Checkpoints


@dataclass(frozen=True)
class Fit:
    """One training on corpora in block stores. Picklable; called on every worker with its place among them."""

    start: Path
    """Transformers folder of the starting weights."""
    out: Path
    """Folder that receives ``model/`` (a Transformers folder) and, with ``milestone_every``, ``step-<n>/`` ones; of a
    private training each holds a ``privacy.json``."""
    options: LoadOptions
    corpora: Mapping[str, tuple[Path, ...]]
    """Folders of the training corpora's block stores, for each of the objective's roles (most have ``train`` alone)."""
    evaluator: Callable[[LoadedModel, Ranks], Evaluator] | None
    """Makes the evaluator on each worker; picklable."""
    objective: Component.Config
    training: TrainingConfig
    compute: ComputeConfig
    seed: int
    log: Path
    """``metrics.jsonl`` that rank 0 appends to."""
    name: str = "all"
    """What the rows of the log call this training."""
    milestone_every: int | None = None
    on_step: Callable[[Step], None] | None = None
    """Called on rank 0 with each report; must be picklable where the training runs in another process."""

    def __call__(self, ranks: Ranks) -> dict[str, Any]:
        """Train, save, and return what rank 0 measured last: loss, losses of the evaluation sets, epsilon spent."""
        loaded = load(self.start, self.options, seed=self.seed)
        parallel = Parallel(loaded.model, ranks, self.compute)
        streams = {role: self._stream(folders) for role, folders in self.corpora.items()}
        pad = loaded.tokenizer.pad_token_id
        assert isinstance(pad, int)
        steps = train(
            parallel,
            Objective.build(self.objective),
            streams,
            self.training,
            seed=self.seed,
            pad_token_id=pad,
            layout=loaded.layout,
            evaluator=self.evaluator(loaded, ranks) if self.evaluator is not None else None,
            checkpoints=Checkpoints(
                self.out / "checkpoints", self._fingerprint(streams), keep=self.training.keep_checkpoints
            ),
            pause_every=self.milestone_every,
        )
        last = None
        for last in steps:
            if ranks.rank == 0:
                log_step(self.log, self.name, last)
                if self.on_step is not None:
                    self.on_step(last)
            if self.milestone_every and last.step % self.milestone_every == 0:
                self._save(parallel, loaded, self.out / f"step-{last.step:08d}", streams, last)
        assert last is not None
        self._save(parallel, loaded, self.out / "model", streams, last)
        if ranks.rank == 0:
            Checkpoints(self.out / "checkpoints", "").clear()
        return {"step": last.step, "loss": last.loss, "evaluation": last.evaluation, "epsilon": last.epsilon}

    def _stream(self, folders: tuple[Path, ...]) -> BlockStream:
        stores = [BlockStore.open(folder) for folder in folders]
        size, privacy = self.training.batch_size, self.training.privacy
        if privacy is None:
            return BlockStream(stores, batch_size=size, seed=self.seed)
        return PoissonStream(stores, batch_size=size, seed=self.seed, secure=privacy.secure)

    def _fingerprint(self, streams: Mapping[str, BlockStream]) -> str:
        settings = [self.objective, self.training, self.options]
        prints = [[role, stream.fingerprint] for role, stream in streams.items()]
        return digest_of([str(self.start), prints, *(s.model_dump(mode="json") for s in settings)])

    def _save(
        self, parallel: Parallel, loaded: LoadedModel, folder: Path, streams: Mapping[str, BlockStream], at: Step
    ) -> None:
        model: nn.Module = loaded.model
        if parallel.sharded:  # gather the shards on rank 0
            whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if parallel.ranks.rank == 0:
                model = load(self.start, self.options, seed=self.seed).model
                model.load_state_dict(whole)
        if parallel.ranks.rank == 0:
            save(model.to(torch.device("cpu")) if parallel.sharded else model, loaded.tokenizer, folder)
            if self.training.privacy is not None:
                write_privacy(folder, account_for(self.training.privacy, streams, steps=at.total), steps=at.step)
        parallel.ranks.barrier()


def log_step(path: Path, job: str, step: Step) -> None:
    """Append one report to a ``metrics.jsonl`` in one write."""
    row = {
        "job": job,
        "step": step.step,
        "of": step.total,
        "loss": step.loss,
        "gradient_norm": step.gradient_norm,
        "learning_rate": step.learning_rate,
        "tokens_per_second": step.tokens_per_second,
        "peak_memory_mb": step.peak_memory_mb,
        "evaluation": dict(step.evaluation) if step.evaluation is not None else None,
        "epsilon": step.epsilon,
    }
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(row) + "\n").encode())
    finally:
        os.close(handle)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows that :func:`log_step` wrote, by step; of a step that was repeated after a loss, the last one."""
    rows: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill
            continue
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]
