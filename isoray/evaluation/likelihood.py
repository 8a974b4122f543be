"""Mean loss of several named sets in one length-sorted pass."""

from __future__ import annotations

from collections.abc import Mapping
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
from isoray.training.batching import Layout, to_batch
from isoray.training.parallel import Parallel, Ranks


class SetLosses:
    """Losses of named evaluation sets; an evaluator of :func:`isoray.training.loop.train`.

    The rows of all sets are sorted by length together and cut into batches of at most ``max_tokens`` padded tokens;
    the batches are made once and kept, because evaluation is repeated many times (UnTrac: every 16 steps). Sums are
    taken in float64 in row order, so the losses do not depend on the cut or on the number of ranks beyond the rounding
    of the forward pass.

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
        for name, store in sets.items():
            if not int(np.asarray(store.label_counts).sum()):
                raise DataError(f"evaluation set {name!r} has no labelled token; check its columns and `length`.")
        stores = list(sets.values())
        lengths = np.concatenate([np.asarray(store.lengths) for store in stores])
        self._set_of_row = np.repeat(np.arange(len(stores)), [len(store) for store in stores])
        row_in_set = np.concatenate([np.arange(len(store)) for store in stores])
        chunks = _chunks(lengths, max_tokens)
        mine = chunks[self._ranks.rank :: self._ranks.world]
        # With FSDP every forward is a collective: a rank without a last batch runs along on one that counts nothing.
        idle = -(-len(chunks) // self._ranks.world) - len(mine)
        self._batches: list[tuple[Tensor, dict[str, Tensor]]] = []
        for rows, counts in [(chunk, True) for chunk in mine] + [(chunks[0], False)] * idle:
            blocks = [stores[self._set_of_row[row]][row_in_set[row]] for row in rows]
            batch = to_batch(
                blocks, filler=blocks[0], pad_token_id=pad_token_id, layout=layout, device=self._ranks.device
            )
            at = torch.tensor(rows if counts else [], dtype=torch.int64, device=self._ranks.device)
            self._batches.append((at, batch))

    def __call__(self, parallel: Parallel) -> dict[str, float]:
        """Mean loss (nats) of each set; every rank gets the same answer."""
        sums = torch.zeros(2, len(self._set_of_row), dtype=torch.float64, device=self._ranks.device)
        for at, batch in self._batches:
            nll_B, count_B = parallel.evaluate(row_nll, batch)
            sums[0, at], sums[1, at] = nll_B[: len(at)].double(), count_B[: len(at)].double()
        nll_R, count_R = self._ranks.sum(sums).cpu().numpy()
        losses = {}
        for which, name in enumerate(self._names):
            mine = (self._set_of_row == which) & (count_R > 0)
            per_row = nll_R[mine] / count_R[mine]
            weights = None if self._average == "example" else count_R[mine]
            losses[name] = float(np.average(per_row, weights=weights))
        return losses


@dataclass(frozen=True)
class StoreLosses:
    """Makes a :class:`SetLosses` of block stores on a worker; picklable."""

    folders: tuple[Path, ...]
    max_tokens: int
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
            max_tokens=self.max_tokens,
        )


def _chunks(lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Row numbers sorted by descending length, cut so that rows x longest stays within ``max_tokens``."""
    chunks: list[list[int]] = []
    for row in np.argsort(-lengths, kind="stable").tolist():
        if chunks and lengths[chunks[-1][0]] * (len(chunks[-1]) + 1) <= max_tokens:
            chunks[-1].append(row)
        else:
            chunks.append([row])
    return chunks
