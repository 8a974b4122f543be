"""From the blocks of an optimizer step to each rank's micro-batches.

Rows of a step are sorted by length, dealt to the ranks in turn, and cut into micro-batches of similar length. The
objective's sums and counts make the result independent of the cut, so it is free to be the fastest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from isoray.corpora.collate import collate
from isoray.corpora.store import Block
from isoray.corpora.stream import Stream
from isoray.objectives.reduce import IGNORE, Batch, is_tree
from isoray.training import trees
from isoray.training.config import ComputeConfig
from isoray.training.parallel import Ranks

Layout = Literal["causal", "seq2seq"]


RUN_COST = 64
"""What a further micro-batch costs, in tokens: its gradients are added to those before, and small products are slow."""


def cut(lengths: np.ndarray, *, world: int, max_tokens: int, max_rows: int | None) -> list[list[list[int | None]]]:
    """Micro-batches of every rank: ``plan[rank][micro_batch]`` lists row numbers; None stands for an empty row.

    Every rank gets as many micro-batches with as many rows as every other, as collectives need. Rows come in descending
    length, and the cuts are those with the least padding and the fewest micro-batches.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    slots = [order[i : i + world] for i in range(0, len(order), world)]
    longest = np.array([max(int(lengths[slot[0]]), 1) for slot in slots], np.int64)
    plan: list[list[list[int | None]]] = [[] for _ in range(world)]
    for start, stop in _cheapest_runs(longest, max_tokens=max_tokens, max_rows=max_rows):
        for rank in range(world):
            plan[rank].append([slot[rank] if rank < len(slot) else None for slot in slots[start:stop]])
    return plan


def _cheapest_runs(longest: np.ndarray, *, max_tokens: int, max_rows: int | None) -> list[tuple[int, int]]:
    """Cut descending lengths into runs so that padded tokens plus ``RUN_COST`` a run are fewest: ``(start, stop)``."""
    # Of the first n lengths: the least cost, and where the last run begins.
    best, begins = np.zeros(len(longest) + 1, np.int64), np.zeros(len(longest) + 1, np.int64)
    for stop in range(1, len(longest) + 1):
        most = max(1, min(max_tokens // int(longest[stop - 1]), max_rows or stop))
        starts = np.arange(max(0, stop - most), stop)
        tokens = (stop - starts) * longest[starts]
        tokens[:-1][tokens[:-1] > max_tokens] = np.iinfo(np.int32).max  # a row alone always fits
        costs = best[starts] + tokens + RUN_COST
        begins[stop] = starts[costs.argmin()]
        best[stop] = costs.min()
    runs: list[tuple[int, int]] = []
    stop = len(longest)
    while stop > 0:
        runs.append((int(begins[stop]), stop))
        stop = int(begins[stop])
    return runs[::-1]


def to_batch(
    blocks: Sequence[Block | None], *, filler: Block, pad_token_id: int, layout: Layout, device: torch.device
) -> dict[str, Tensor]:
    """A collated batch on ``device``; an empty row (None) is ``filler`` without labels.

    The tensors that keep packed documents apart are dropped where every row holds one document.
    """
    filled = [filler if block is None else block for block in blocks]
    batch = collate(filled, pad_token_id=pad_token_id, layout=layout)
    for row, block in enumerate(blocks):
        if block is None:
            batch["labels"][row] = IGNORE
    if layout == "causal" and all(block.segment_ids[-1] == block.segment_ids[0] for block in filled):
        batch = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def without_labels(batch: Batch) -> dict[str, Tensor]:
    """``batch`` as it would be if no token were labelled: it runs through the model and counts nothing."""
    if not is_tree(batch):
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
    none = {name: batch[name][:0] for name in ("predictors", "targets", "owners")}
    zeros = {name: torch.zeros_like(batch[name]) for name in ("predicts", "counts")}
    return {**batch, **none, **zeros}


class Layouter:
    """Lays rows out as micro-batches: sorted by length, or as prefix trees where rows that begin alike save enough."""

    def __init__(self, compute: ComputeConfig, ranks: Ranks, *, pad_token_id: int, layout: Layout) -> None:
        self._max_tokens, self._max_rows = compute.training_tokens(ranks.device.type), compute.micro_batch_rows
        self._ranks, self._pad, self._layout = ranks, pad_token_id, layout

    def as_rows(
        self, lengths: np.ndarray, load: Callable[[Sequence[int]], Sequence[Block]], *, max_rows: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches of the rows whose ``lengths`` are given; ``load`` reads some of them."""
        max_rows = self._max_rows if max_rows is None else max_rows
        plan = cut(lengths, world=self._ranks.world, max_tokens=self._max_tokens, max_rows=max_rows)
        for rows in plan[self._ranks.rank]:
            loaded = load([row for row in rows if row is not None])
            filler = loaded[0] if loaded else load([0])[0]
            present = iter(loaded)
            yield to_batch(
                [None if row is None else next(present) for row in rows],
                filler=filler,
                pad_token_id=self._pad,
                layout=self._layout,
                device=self._ranks.device,
            )

    def as_trees(self, blocks: Sequence[Block], *, max_rows: int | None = None) -> list[dict[str, Tensor]] | None:
        """This rank's micro-batches of ``blocks`` as prefix trees; None where they save too little, or are too few for
        every rank to have one.

        With ``max_rows`` a micro-batch has at most the tokens of so many blocks (and at least one tree): a tree stands
        for many of them, so that counting trees would not bound the memory.
        """
        world = self._ranks.world
        if self._layout != "causal" or (planted := trees.plant(blocks)) is None or len(planted) < world:
            return None
        max_rows = self._max_rows if max_rows is None else max_rows
        longest = max(len(block.input_ids) for block in blocks)
        most = self._max_tokens if max_rows is None else min(self._max_tokens, max_rows * longest)
        fair = -(-len(planted) // world) * max(map(len, planted))
        chunks = list(trees.cut(planted, max_tokens=min(most, fair)))
        mine, missing = self._ranks.deal(chunks)
        return [self._tree_batch(chunk) for chunk in mine] + [without_labels(self._tree_batch(chunks[0]))] * missing

    def _tree_batch(self, planted: Sequence[trees.Tree]) -> dict[str, Tensor]:
        return trees.to_batch(planted, pad_token_id=self._pad, device=self._ranks.device)


class MicroBatches:
    """The micro-batches of one rank for every step, as a pure function of (seed, step, data).

    ``with_trees`` says whether the model computes prefix trees; it is asked only where they would save something.
    """

    def __init__(self, streams: Mapping[str, Stream], layouter: Layouter, *, with_trees: Callable[[], bool]) -> None:
        self._streams, self._layouter = streams, layouter
        # The first step decides for all, whichever step a resumed training begins with.
        self._planted = {role for role, stream in streams.items() if self._begin_alike(stream) and with_trees()}

    def at(self, step: int) -> list[dict[str, Batch]]:
        """Micro-batches of step ``step``: each maps every role to its batch."""
        per_role = {role: self._of(role, step) for role in self._streams}
        number = {role: len(batches) for role, batches in per_role.items()}
        # Roles of different size are paired as far as they go; the shorter one repeats nothing and counts nothing.
        micro_batches: list[dict[str, Batch]] = []
        for index in range(max(number.values())):
            micro_batches.append(
                {
                    role: batches[index] if index < len(batches) else without_labels(batches[0])
                    for role, batches in per_role.items()
                }
            )
        return micro_batches

    def _of(self, role: str, step: int) -> list[dict[str, Tensor]]:
        stream = self._streams[role]
        refs = stream.refs(step)
        if role in self._planted and (batches := self._layouter.as_trees(stream.load(refs))) is not None:
            return batches
        return list(self._layouter.as_rows(stream.lengths(refs), lambda rows: stream.load([refs[row] for row in rows])))

    def _begin_alike(self, stream: Stream) -> bool:
        refs = stream.refs(0)
        if len(refs) < 2 or stream.lengths(refs).max() > trees.WIDTH:
            return False
        return self._layouter.as_trees(stream.load(refs)) is not None
