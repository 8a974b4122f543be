"""Batches: padding carries no loss, positions restart, encoder-decoder sources and targets are told apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isoray.corpora.collate import collate
from isoray.corpora.store import Block
from isoray.errors import DataError


def block(ids: list[int], labels: list[int], segments: list[int]) -> Block:
    return Block(np.array(ids, np.int32), np.array(labels, np.int32), np.array(segments, np.int32))


PACKED = block([5, 6, 7, 8, 9, 4], [-100, 6, -100, 8, 9, -100], [0, 0, 1, 1, 1, 2])
SHORT = block([3, 2], [-100, 2], [0, 0])


def test_causal_batches() -> None:
    batch = collate([PACKED, SHORT], pad_token_id=1, pad_to_multiple_of=4)
    expected = {
        "input_ids": [[5, 6, 7, 8, 9, 4, 1, 1], [3, 2, 1, 1, 1, 1, 1, 1]],
        "labels": [[-100, 6, -100, 8, 9, -100, -100, -100], [-100, 2] + [-100] * 6],
        "position_ids": [[0, 1, 0, 1, 2, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]],
        "segment_ids": [[0, 0, 1, 1, 1, 2, -1, -1], [0, 0] + [-1] * 6],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_seq2seq_batches() -> None:
    long = block([5, 6, 7, 8, 9], [-100, -100, -100, 8, 9], [0] * 5)
    batch = collate([long, SHORT], pad_token_id=1, layout="seq2seq")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [3, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[8, 9], [2, -100]]


def test_packed_blocks_have_no_single_source() -> None:
    with pytest.raises(DataError, match="holds 3 documents"):
        collate([PACKED], pad_token_id=1, layout="seq2seq")
