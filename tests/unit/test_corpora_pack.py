"""Packing against a slow, obvious reference: lists of documents, cut token by token."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from isoray.corpora.pack import Cuts, Flat, flatten, gather, join, one_per_block, pack, with_rest, without_unlabelled
from isoray.corpora.shards import commit_store, write_shard
from isoray.corpora.store import Block

Documents = list[tuple[list[int], int]]
"""(tokens, how many are the prompt)."""


def random_documents(seed: int, *, prompts: bool, longest: int = 30, count: int = 40) -> Documents:
    draw = random.Random(seed)
    documents = []
    for _ in range(draw.randrange(1, count)):
        tokens = [draw.randrange(1000) for _ in range(draw.randrange(2, longest))]
        documents.append((tokens, draw.randrange(len(tokens)) if prompts else 0))
    return documents


def reference_pack(documents: Documents, length: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(input_ids, labels, segment_ids) of each block, the last one possibly short."""
    blocks: list[tuple[list[int], list[int], list[int]]] = [([], [], [])]
    for tokens, prompt in documents:
        segment = blocks[-1][2][-1] + 1 if blocks[-1][2] else 0
        first = True
        for place, token in enumerate(tokens):
            if len(blocks[-1][0]) == length:
                blocks.append(([], [], []))
                segment, first = 0, True
            ids, labels, segments = blocks[-1]
            ids.append(token)
            labels.append(-100 if first or place < prompt else token)
            segments.append(segment)
            first = False
    return blocks


def flat(documents: Documents) -> Flat:
    tokens = np.array([token for tokens, _ in documents for token in tokens], np.uint16)
    lengths = np.array([len(tokens) for tokens, _ in documents])
    return flatten(tokens, lengths, np.array([prompt for _, prompt in documents]))


def blocks_of(cuts: Cuts, folder: Path) -> list[tuple[list[int], list[int], list[int]]]:
    """The blocks as a store gives them back."""
    shard = write_shard(
        folder, 0, tokens=cuts.tokens, offsets=cuts.offsets, starts=cuts.starts, labels=cuts.labels, vocab_size=1000
    )
    store = commit_store(folder, [shard], name="x", documents=0)
    for index, block in enumerate(store):
        assert store.label_counts[index] == (block.labels != -100).sum()
    return [lists(block) for block in store]


def lists(block: Block) -> tuple[list[int], list[int], list[int]]:
    return block.input_ids.tolist(), block.labels.tolist(), block.segment_ids.tolist()


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_packing_in_windows_equals_the_reference(tmp_path: Path, seed: int, prompts: bool) -> None:
    documents = random_documents(seed, prompts=prompts)
    draw = random.Random(seed)
    length = draw.randrange(2, 40)
    cuts, rest = pack(flat(documents), length)
    assert blocks_of(with_rest(cuts, rest), tmp_path / "whole") == reference_pack(documents, length)
    # What two windows leave over is joined and packed once more.
    border = draw.randrange(len(documents) + 1)
    parts = [documents[:border], documents[border:]]
    packed = [pack(flat(part), length) for part in parts if part]
    last, rest = pack(join([left for _, left in packed]), length)
    found = [
        block
        for number, cut in enumerate([*(cut for cut, _ in packed), with_rest(last, rest)])
        for block in blocks_of(cut, tmp_path / str(number))
    ]
    assert sorted(token for ids, _, _ in found for token in ids) == sorted(t for tokens, _ in documents for t in tokens)
    assert [len(ids) for ids, _, _ in found[:-1]] == [length] * (len(found) - 1)
    expected = [block for part in parts if part for block in reference_pack(part, length) if len(block[0]) == length]
    assert [block for block in found if block in expected] == expected


@pytest.mark.parametrize("seed", range(8))
def test_one_document_per_block(tmp_path: Path, seed: int) -> None:
    documents = random_documents(seed, prompts=seed % 2 == 1)
    length, prefix = 12, 2
    documents = [(tokens, max(prompt, prefix) if prompt else 0) for tokens, prompt in documents]
    expected = []
    for tokens, prompt in documents:
        tokens = list(tokens)
        while len(tokens) > length and prompt > prefix:
            del tokens[prefix]
            prompt -= 1
        tokens = tokens[:length]
        labels = [-100 if place < max(prompt, 1) else token for place, token in enumerate(tokens)]
        expected.append((tokens, labels, [0] * len(tokens)))
    lengths = np.array([len(tokens) for tokens, _ in documents])
    prompts = np.array([prompt for _, prompt in documents])
    tokens_ = np.array([token for tokens, _ in documents for token in tokens], np.uint16)
    cuts = one_per_block(tokens_, lengths, prompts, length=length, prefix=prefix)
    assert blocks_of(cuts, tmp_path) == expected


def test_blocks_without_labels_are_left_out(tmp_path: Path) -> None:
    documents: Documents = [([1, 2, 3], 0), ([4], 0), ([5], 0), ([6, 7, 8, 9, 10, 11], 5), ([12], 0)]
    cuts, rest = pack(flat(documents), 3)
    cuts = with_rest(cuts, rest)
    every = reference_pack(documents, 3)
    assert blocks_of(cuts, tmp_path / "all") == every
    labelled = [block for block in every if any(label != -100 for label in block[1])]
    assert blocks_of(without_unlabelled(cuts), tmp_path / "some") == labelled
    assert 0 < len(labelled) < len(every)


def test_gathering_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isoray.corpora.pack.GATHER_TOKENS", 50)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 1000, 5000).astype(np.uint16)
    for count in (0, 1, 7, 300):
        begins, lengths = draw.integers(0, 4000, count), draw.integers(0, 120, count)
        found = gather(tokens, begins, lengths)
        expected = [tokens[begin : begin + length] for begin, length in zip(begins, lengths, strict=True)]
        assert np.array_equal(found, np.concatenate([tokens[:0], *expected]))
