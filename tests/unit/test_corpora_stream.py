"""Streams: order is a pure function of (seed, step, data); leaving a corpus out changes nothing else."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from isoray.corpora.shards import write_store
from isoray.corpora.store import Block, BlockStore
from isoray.corpora.stream import BlockRef, BlockStream
from isoray.errors import DataError, UserError

SIZES = {"a": 7, "b": 5, "c": 11}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[BlockStore]:
    folder = tmp_path_factory.mktemp("stores")

    def blocks(start: int, count: int) -> Iterator[Block]:
        for i in range(count):
            ids = np.full(2 + i % 3, start + i, np.int32)
            yield Block(ids, ids, np.zeros_like(ids))

    return [
        write_store(folder / name, blocks(100 * number, size), name=name, vocab_size=1000)
        for number, (name, size) in enumerate(SIZES.items())
    ]


def take(stream: BlockStream, count: int) -> list[BlockRef]:
    """The first ``count`` blocks of the stream."""
    refs: list[BlockRef] = []
    step = 0
    while len(refs) < count:
        refs += stream.refs(step)
        step += 1
    return refs[:count]


def test_a_step_does_not_depend_on_what_was_asked_before(stores: list[BlockStore]) -> None:
    for exclude in [(), ("b",), ("a", "c")]:
        stream = BlockStream(stores, batch_size=4, seed=3, exclude=exclude)
        in_order = [stream.refs(step) for step in range(40)]
        steps = list(range(40))
        random.Random(0).shuffle(steps)
        other = BlockStream(stores, batch_size=4, seed=3, exclude=exclude)
        assert {step: other.refs(step) for step in steps} == dict(enumerate(in_order))
        resumed = pickle.loads(pickle.dumps(stream))
        assert resumed.refs(39) == in_order[39]
        assert resumed.fingerprint == stream.fingerprint


def test_every_epoch_is_a_permutation_and_batches_are_full(stores: list[BlockStore]) -> None:
    stream = BlockStream(stores, batch_size=4, seed=1)
    everything = {BlockRef(s, i) for s, size in enumerate(SIZES.values()) for i in range(size)}
    refs = take(stream, 3 * 23)
    epochs = [refs[i : i + 23] for i in range(0, 69, 23)]
    assert all(set(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(len(stream.refs(step)) == 4 for step in range(20))
    assert stream.steps_per_epoch == 6


def test_the_order_does_not_depend_on_the_batch_size(stores: list[BlockStore]) -> None:
    one, many = (BlockStream(stores, batch_size=size, seed=1, exclude=["a"]) for size in (1, 50))
    assert take(one, 100) == take(many, 100)


def test_seeds_give_different_orders(stores: list[BlockStore]) -> None:
    orders = {tuple(take(BlockStream(stores, batch_size=4, seed=seed), 23)) for seed in range(5)}
    assert len(orders) == 5


def test_leaving_a_corpus_out_replaces_its_blocks_and_no_others(stores: list[BlockStore]) -> None:
    full = BlockStream(stores, batch_size=4, seed=7)
    without = BlockStream(stores, batch_size=4, seed=7, exclude=["c"])
    pairs = list(zip(take(full, 230), take(without, 230), strict=True))
    assert all(new == old for old, new in pairs if old.store != 2)
    replacements = [new for old, new in pairs if old.store == 2]
    assert len(replacements) == 110
    assert all(new.store != 2 for new in replacements)
    # Replacements pass through all remaining blocks before one comes a second time.
    counts = Counter(replacements)
    assert len(counts) == 12 and max(counts.values()) - min(counts.values()) <= 1
    assert without.steps_per_epoch == 3
    assert without.fingerprint != full.fingerprint


def test_unshuffled_streams_keep_the_order(stores: list[BlockStore]) -> None:
    stream = BlockStream(stores, batch_size=5, seed=0, shuffle=False, exclude=["b"])
    epoch = [BlockRef(0, i) for i in range(7)] + [BlockRef(2, i) for i in range(11)]
    assert stream.steps_per_epoch == 4
    assert [len(stream.refs(step)) for step in range(5)] == [5, 5, 5, 3, 5]
    assert [ref for step in range(4) for ref in stream.refs(step)] == epoch
    assert stream.refs(4) == stream.refs(0)


def test_loading_and_lengths(stores: list[BlockStore]) -> None:
    stream = BlockStream(stores, batch_size=4, seed=0)
    refs = stream.refs(2)
    blocks = stream.load(refs)
    assert [block.input_ids[0] for block in blocks] == [100 * ref.store + ref.index for ref in refs]
    assert stream.lengths(refs).tolist() == [len(block.input_ids) for block in blocks]


def test_mistakes_are_named(stores: list[BlockStore]) -> None:
    with pytest.raises(UserError, match=r"'a'|one of: a, b, c"):
        BlockStream(stores, batch_size=1, seed=0, exclude=["aa"])
    with pytest.raises(UserError, match="batch_size is 0"):
        BlockStream(stores, batch_size=0, seed=0)
    with pytest.raises(DataError, match="no blocks"):
        BlockStream(stores, batch_size=1, seed=0, exclude=["a", "b", "c"])
    with pytest.raises(DataError, match="no blocks"):
        BlockStream([], batch_size=1, seed=0)
