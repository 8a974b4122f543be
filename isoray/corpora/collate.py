"""Blocks become a batch: a dict of padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isoray.corpora.store import IGNORED, Block
from isoray.errors import DataError

Layout = Literal["causal", "seq2seq"]


def collate(
    blocks: Sequence[Block], *, pad_token_id: int, layout: Layout = "causal", pad_to_multiple_of: int = 1
) -> dict[str, Tensor]:
    """A batch of ``blocks``, one per row, padded on the right; all tensors int64.

    causal, all [B, T]: input_ids, labels (pads -100), position_ids (restart at every segment; pads 0), segment_ids
    (pads -1). seq2seq: a block's unlabelled tokens are the encoder's input and the labelled ones the decoder's target:
    input_ids [B, S], attention_mask [B, S], labels [B, T]; raises DataError for a packed block, which has no single
    source.
    """
    if layout == "causal":
        columns: dict[str, tuple[list[npt.NDArray[Any]], int]] = {
            "input_ids": ([block.input_ids for block in blocks], pad_token_id),
            "labels": ([block.labels for block in blocks], IGNORED),
            "position_ids": ([position_ids(block.segment_ids) for block in blocks], 0),
            "segment_ids": ([block.segment_ids for block in blocks], -1),
        }
    else:
        packed = next((block for block in blocks if len(block.segment_ids) and block.segment_ids[-1] > 0), None)
        if packed is not None:
            raise DataError(
                f"a block holds {packed.segment_ids[-1] + 1} documents, but an encoder-decoder needs one source and "
                "one target per block: build the corpus from prompt and response columns with `packing: false`"
            )
        sources = [block.input_ids[block.labels == IGNORED] for block in blocks]
        columns = {
            "input_ids": (sources, pad_token_id),
            "attention_mask": ([np.ones_like(source) for source in sources], 0),
            "labels": ([block.input_ids[block.labels != IGNORED] for block in blocks], IGNORED),
        }
    return {name: _pad(rows, fill, pad_to_multiple_of) for name, (rows, fill) in columns.items()}


def position_ids(segment_ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """int64 [T]: the position of each token in its own segment."""
    positions = np.arange(len(segment_ids))
    starts = np.where(np.diff(segment_ids, prepend=-1) != 0, positions, 0)
    restarted: npt.NDArray[np.int64] = positions - np.maximum.accumulate(starts)
    return restarted


def _pad(rows: Sequence[npt.NDArray[Any]], fill: int, multiple: int) -> Tensor:
    width = max((len(row) for row in rows), default=0)
    width = -(-width // multiple) * multiple
    batch = np.full((len(rows), width), fill, np.int64)
    for target, row in zip(batch, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(batch)
