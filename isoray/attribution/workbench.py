"""What a lane's worker keeps open for all its jobs: one model, the weights to start from, the corpora."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from isoray.corpora.store import Block, Blocks, BlockStore
from isoray.evaluation.likelihood import SetLosses
from isoray.models.config import LoadOptions
from isoray.models.load import LoadedModel, load
from isoray.models.snapshot import Snapshot
from isoray.training import trees
from isoray.training.batching import Layouter
from isoray.training.config import ComputeConfig
from isoray.training.lanes import Rank
from isoray.training.memory import give_freed_memory_back
from isoray.training.parallel import Parallel, Ranks

EVALUATORS = 4
"""How many evaluators a workbench keeps: each holds its sets laid out, some 30 bytes a token."""

Digests = tuple[tuple[str, str], ...]
"""Names and contents of sets."""


@dataclass(frozen=True)
class OpenWorkbench:
    """Opens a :class:`Workbench` in a worker; picklable."""

    starts: Mapping[str, Path]
    """Transformers folders of one architecture, by the names that jobs use."""
    options: LoadOptions
    compute: ComputeConfig
    train: tuple[Path, ...]
    """Folders of the training corpora's block stores."""
    test: tuple[Path, ...]
    """Folders of the test sets' block stores."""
    average: Literal["example", "token"]
    """What the loss of a set is the mean of."""
    seed: int
    digest: str = ""
    """What the starts, the corpora and the options are, whatever folders they lie in."""

    def __call__(self, rank: Rank) -> Workbench:
        """The workbench of the worker at ``rank``."""
        return Workbench(self, rank)


class Workbench:
    """One model on this worker's device, which jobs bring back to a named start in memory."""

    def __init__(self, plan: OpenWorkbench, rank: Rank) -> None:
        self.average = plan.average
        self.digest = plan.digest
        self.compute = plan.compute
        self.progress = rank.progress
        """Tell how much of the current job is done, from 0 to 1; it also proves that the job is alive."""
        self.train = {store.name: store for store in map(BlockStore.open, plan.train)}
        self.test = {store.name: store for store in map(BlockStore.open, plan.test)}
        self._plan = plan
        self._snapshots: dict[str, Snapshot] = {}
        self._evaluators: dict[Digests, SetLosses] = {}
        self._losses_at: dict[tuple[str, Digests], dict[str, float]] = {}
        self.ranks = Ranks(rank.rank, rank.world, torch.device(rank.device))
        self._open(next(iter(plan.starts)))

    def start(self, name: str) -> Parallel:
        """The model with the weights of ``name``, ready to train or to evaluate; no gradients, no optimizer state."""
        give_freed_memory_back()  # of the last job's optimizer
        if self._plan.options.adapter is not None:
            # An adapter's snapshot leaves out the frozen weights, which differ between starts.
            if name != self._opened:
                self._open(name)
        elif name not in self._snapshots:
            other = load(self._plan.starts[name], self._plan.options, seed=self._plan.seed).model
            if self.parallel.sharded:
                self._open(name)
            else:
                self._snapshots[name] = Snapshot(other, self._plan.starts[name])
        self._snapshots[name].restore(self.parallel.model)
        return self.parallel

    def losses(self, sets: Mapping[str, Blocks]) -> SetLosses:
        """An evaluator of ``sets``; the same one where an earlier job watched them."""
        digests = _digests(sets)
        if digests not in self._evaluators:
            if len(self._evaluators) == EVALUATORS:
                del self._evaluators[next(iter(self._evaluators))]
            self._evaluators[digests] = SetLosses(
                sets,
                pad_token_id=self.pad_token_id,
                layout=self._loaded.layout,
                ranks=self.ranks,
                average=self.average,
                max_tokens=self.compute.evaluation_tokens(self.ranks.device.type),
            )
        return self._evaluators[digests]

    def losses_at(self, start: str, sets: Mapping[str, Blocks]) -> dict[str, float]:
        """Losses of ``sets`` at the weights of ``start``: the first point of every curve from there, computed once."""
        key = (start, _digests(sets))
        if key not in self._losses_at:
            self._losses_at[key] = self.losses(sets)(self.start(start))
        return dict(self._losses_at[key])

    def batches(self, blocks: Sequence[Block] | Blocks, *, rows: int, share: bool) -> Iterator[dict[str, Tensor]]:
        """``blocks`` in micro-batches of at most ``rows`` rows, length-sorted or as trees, on this worker's device.

        All of them, or with ``share`` this worker's part, empty rows included where the workers' parts differ.
        """
        ranks = self.ranks if share else Ranks(device=self.ranks.device)
        layouter = Layouter(self.compute, ranks, pad_token_id=self.pad_token_id, layout=self._loaded.layout)
        loaded = [blocks[row] for row in range(len(blocks))]
        planted = layouter.as_trees(loaded, max_rows=rows)
        if planted is not None and trees.supported(self.parallel):
            yield from planted
            return
        lengths = np.array([len(block.input_ids) for block in loaded])
        yield from layouter.as_rows(lengths, lambda chosen: [loaded[row] for row in chosen], max_rows=rows)

    @property
    def layout(self) -> Literal["causal", "seq2seq"]:
        """Whether labels are on the sequence itself or on the decoder's side."""
        return self._loaded.layout

    @property
    def is_first(self) -> bool:
        """Whether this worker is rank 0 of its lane."""
        return self.ranks.rank == 0

    def _open(self, name: str) -> None:
        self._loaded: LoadedModel = load(self._plan.starts[name], self._plan.options, seed=self._plan.seed)
        pad = self._loaded.tokenizer.pad_token_id
        assert isinstance(pad, int)
        self.pad_token_id = pad
        model: nn.Module = self._loaded.model
        self.parallel = Parallel(model, self.ranks, self.compute)
        self._snapshots = {name: Snapshot(model, self._plan.starts[name])}
        self._opened = name


def _digests(sets: Mapping[str, Blocks]) -> Digests:
    return tuple((name, blocks.digest) for name, blocks in sets.items())
