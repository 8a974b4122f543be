"""Mean loss of several named sets in one length-sorted pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from isoray.corpora.store import Blocks, BlockStore
from isoray.errors import DataError
from isoray.models.load import LoadedModel
from isoray.objectives.reduce import row_nll
from isoray.training import trees
from isoray.training.batching import Layout, to_batch
from isoray.training.config import ComputeConfig
from isoray.training.parallel import Parallel, Ranks


class SetLosses:
    """Losses of named evaluation sets; an evaluator of :func:`isoray.training.loop.train`.

    The rows of all sets are sorted by length together and cut into batches of at most ``max_tokens`` padded tokens;
    sets whose examples begin alike are laid out as prefix trees instead (:mod:`isoray.training.trees`). The batches
    are made once and kept, because evaluation is repeated many times (UnTrac: every 16 steps). Sums are taken in
    float64 in row order, so the losses do not depend on the cut or on the number of ranks beyond the rounding of the
    forward pass.

    ``average="example"``: mean over examples of each example's mean token NLL (the paper). ``"token"``: NLL of all
    labelled tokens over their number.
    """

    def __init__(
        self,
        sets: Mapping[str, Blocks],
        *,
        pad_token_id: int,
        layout: Layout = "causal",
        ranks: Ranks | None = None,
        average: Literal["example", "token"] = "example",
        max_tokens: int,
    ) -> None:
        self._ranks = ranks or Ranks.current()
        self._names = list(sets)
        self._average = average
        self._pad, self._layout = pad_token_id, layout
        self._max_tokens = max_tokens
        for name, store in sets.items():
            if not int(np.asarray(store.label_counts).sum()):
                raise DataError(f"evaluation set {name!r} has no labelled token; check its columns and `length`.")
        self._stores = list(sets.values())
        self._set_of_row = np.repeat(np.arange(len(self._stores)), [len(store) for store in self._stores])
        self._row_in_set = np.concatenate([np.arange(len(store)) for store in self._stores])
        self._batches: list[_Batch] | None = None

    def __call__(self, parallel: Parallel) -> dict[str, float]:
        """Mean loss (nats) of each set; every rank gets the same answer."""
        if self._batches is None:
            self._batches = self._lay_out(with_trees=self._layout == "causal" and trees.supported(parallel))
        sums = torch.zeros(2, len(self._set_of_row), dtype=torch.float64, device=self._ranks.device)
        for batch in self._batches:
            nll_B, count_B = parallel.evaluate(row_nll, batch.tensors)
            if batch.counts:
                sums[0, batch.rows_B] = nll_B.double()
                sums[1, batch.rows_B] = count_B.double()
        nll_R, count_R = self._ranks.sum(sums).cpu().numpy()
        losses = {}
        for which, name in enumerate(self._names):
            mine = (self._set_of_row == which) & (count_R > 0)
            per_row = nll_R[mine] / count_R[mine]
            weights = None if self._average == "example" else count_R[mine]
            losses[name] = float(np.average(per_row, weights=weights))
        return losses

    def _lay_out(self, *, with_trees: bool) -> list[_Batch]:
        """This rank's batches."""
        lengths = np.concatenate([np.asarray(store.lengths) for store in self._stores])
        plain = np.ones(len(lengths), np.bool_)
        chunks: list[Sequence[int] | Sequence[trees.Tree]] = []
        for which, store in enumerate(self._stores) if with_trees else ():
            rows = np.flatnonzero(self._set_of_row == which)
            if planted := trees.plant([store[row] for row in range(len(store))], first=int(rows[0])):
                plain[rows] = False
                chunks += trees.cut(planted, max_tokens=self._max_tokens)
        chunks += _chunks(np.flatnonzero(plain), lengths, self._max_tokens)
        # With FSDP every forward pass is a collective: a rank without a last batch runs along, on one that counts not.
        mine, missing = self._ranks.deal(chunks)
        return [self._batch(chunk, counts=True) for chunk in mine] + [self._batch(chunks[0], counts=False)] * missing

    def _batch(self, chunk: Sequence[int] | Sequence[trees.Tree], *, counts: bool) -> _Batch:
        device = self._ranks.device
        rows = [part for part in chunk if isinstance(part, int)]
        if rows:
            blocks = [self._stores[self._set_of_row[row]][self._row_in_set[row]] for row in rows]
            tensors = to_batch(blocks, filler=blocks[0], pad_token_id=self._pad, layout=self._layout, device=device)
        else:
            planted = [part for part in chunk if isinstance(part, trees.Tree)]
            rows = trees.examples(planted)
            tensors = trees.to_batch(planted, pad_token_id=self._pad, device=device)
        return _Batch(tensors, torch.tensor(rows, device=device), counts)


@dataclass(frozen=True)
class _Batch:
    """Ready for a forward pass."""

    tensors: dict[str, Tensor]
    rows_B: Tensor
    """Which rows of all sets it holds."""
    counts: bool
    """Whether it is this rank's to count."""


@dataclass(frozen=True)
class StoreLosses:
    """Makes a :class:`SetLosses` of block stores on a worker; picklable."""

    folders: tuple[Path, ...]
    compute: ComputeConfig
    average: Literal["example", "token"] = "example"

    def __call__(self, loaded: LoadedModel, ranks: Ranks) -> SetLosses:
        """The evaluator of the stores in ``folders``, by their names."""
        pad = loaded.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return SetLosses(
            {store.name: store for store in (BlockStore.open(folder) for folder in self.folders)},
            pad_token_id=pad,
            layout=loaded.layout,
            ranks=ranks,
            average=self.average,
            max_tokens=self.compute.evaluation_tokens(ranks.device.type),
        )


def _chunks(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    """``rows`` sorted by descending length, cut so that rows x longest stays within ``max_tokens``."""
    chunks: list[list[int]] = []
    for row in rows[np.argsort(-lengths[rows], kind="stable")].tolist():
        if chunks and lengths[chunks[-1][0]] * (len(chunks[-1]) + 1) <= max_tokens:
            chunks[-1].append(row)
        else:
            chunks.append([row])
    return chunks
