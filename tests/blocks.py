"""In-memory stores of random blocks for tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from isoray.corpora.store import Block


class ListStore:
    """Blocks in a list, with a store's interface."""

    def __init__(self, name: str, blocks: Sequence[Block]) -> None:
        self.name = name
        self.blocks = list(blocks)
        self.lengths = np.array([len(b.input_ids) for b in blocks], np.int32)
        self.label_counts = np.array([(b.labels != -100).sum() for b in blocks], np.int32)
        self.digest = hashlib.sha256(b"".join(b.input_ids.tobytes() for b in blocks)).hexdigest()

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Block:
        return self.blocks[index]

    def subset(self, indices: Iterable[int]) -> ListStore:
        return ListStore(self.name, [self.blocks[i] for i in indices])


def document(length: int, *, seed: int, vocabulary: int = 97, prompt: int = 1) -> Block:
    """One random document; its first ``prompt`` tokens carry no label."""
    ids = np.random.default_rng(seed).integers(3, vocabulary, length).astype(np.int32)
    labels = ids.copy()
    labels[:prompt] = -100
    return Block(ids, labels, np.zeros(length, np.int32))


def packed(documents: Sequence[Block]) -> Block:
    """Several documents in one block."""
    segments = [np.full(len(d.input_ids), n, np.int32) for n, d in enumerate(documents)]
    return Block(
        np.concatenate([d.input_ids for d in documents]),
        np.concatenate([d.labels for d in documents]),
        np.concatenate(segments),
    )


def ragged(name: str, rows: int, *, seed: int, shortest: int = 4, longest: int = 17, prompt: int = 1) -> ListStore:
    """A store of documents of random lengths."""
    lengths = np.random.default_rng(seed).integers(shortest, longest + 1, rows)
    return ListStore(name, [document(int(n), seed=seed * 1000 + i, prompt=prompt) for i, n in enumerate(lengths)])


def templates(name: str, rows: int, *, seed: int) -> ListStore:
    """Examples with common beginnings of several lengths, some of them whole examples, some twice."""
    draw = np.random.default_rng(seed)
    stem = draw.integers(3, 97, 30)
    blocks = []
    for _ in range(rows):
        ids = np.concatenate([stem[: draw.integers(5, 30)], draw.integers(3, 6, draw.integers(1, 6))]).astype(np.int32)
        labels = ids.copy()
        labels[: draw.integers(1, len(ids))] = -100
        blocks.append(Block(ids, labels, np.zeros(len(ids), np.int32)))
    return ListStore(name, [*blocks, *blocks[:3]])
