"""From the blocks of an optimizer step to each rank's micro-batches.

Rows of a step are sorted by length, dealt to the ranks in turn, and cut into micro-batches of similar length. The
objective's sums and counts make the result independent of the cut, so it is free to be the fastest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from isoray.corpora.collate import collate
from isoray.corpora.store import Block
from isoray.corpora.stream import BlockStream
from isoray.objectives.reduce import IGNORE, Batch
from isoray.training.config import ComputeConfig
from isoray.training.parallel import Ranks

Layout = Literal["causal", "seq2seq"]


def cut(lengths: np.ndarray, *, world: int, max_tokens: int, max_rows: int | None) -> list[list[list[int | None]]]:
    """Micro-batches of every rank: ``plan[rank][micro_batch]`` lists row numbers; None stands for an empty row.

    Every rank gets as many micro-batches with as many rows as every other, as collectives need.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    slots = [order[i : i + world] for i in range(0, len(order), world)]
    plan: list[list[list[int | None]]] = [[] for _ in range(world)]
    start = 0
    while start < len(slots):
        longest = max(int(lengths[slots[start][0]]), 1)  # sorted, so the first row of a run is its longest
        rows = max(1, max_tokens // longest)
        stop = min(len(slots), start + (rows if max_rows is None else min(rows, max_rows)))
        for rank in range(world):
            plan[rank].append([slot[rank] if rank < len(slot) else None for slot in slots[start:stop]])
        start = stop
    return plan


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


class MicroBatches:
    """The micro-batches of one rank for every step, as a pure function of (seed, step, data)."""

    def __init__(
        self,
        streams: Mapping[str, BlockStream],
        compute: ComputeConfig,
        ranks: Ranks,
        *,
        pad_token_id: int,
        layout: Layout,
    ) -> None:
        self._streams, self._compute, self._ranks = streams, compute, ranks
        self._pad, self._layout = pad_token_id, layout

    def at(self, step: int) -> list[dict[str, Batch]]:
        """Micro-batches of step ``step``: each maps every role to its batch."""
        per_role = {role: self._of(stream, step) for role, stream in self._streams.items()}
        number = {role: len(batches) for role, batches in per_role.items()}
        # Roles of different size are paired as far as they go; the shorter one repeats nothing and counts nothing.
        micro_batches: list[dict[str, Batch]] = []
        for index in range(max(number.values())):
            micro_batches.append(
                {
                    role: batches[index] if index < len(batches) else _without_labels(batches[0])
                    for role, batches in per_role.items()
                }
            )
        return micro_batches

    def _of(self, stream: BlockStream, step: int) -> list[dict[str, Tensor]]:
        refs = stream.refs(step)
        plan = cut(
            stream.lengths(refs),
            world=self._ranks.world,
            max_tokens=self._compute.training_tokens(self._ranks.device.type),
            max_rows=self._compute.micro_batch_rows,
        )
        batches = []
        for rows in plan[self._ranks.rank]:
            loaded = stream.load([refs[row] for row in rows if row is not None])
            filler = loaded[0] if loaded else stream.load(refs[:1])[0]
            present = iter(loaded)
            batches.append(
                to_batch(
                    [None if row is None else next(present) for row in rows],
                    filler=filler,
                    pad_token_id=self._pad,
                    layout=self._layout,
                    device=self._ranks.device,
                )
            )
        return batches


def _without_labels(batch: Batch) -> dict[str, Tensor]:
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
