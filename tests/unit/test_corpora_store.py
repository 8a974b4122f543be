"""Stores: what is written comes back, damage is noticed, content decides the digest."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from isoray.corpora.shards import atomic_folder, write_store
from isoray.corpora.store import IGNORED, Block, BlockStore
from isoray.errors import DataError


def make_block(ids: list[int], segments: list[int] | None = None, *, unlabelled: tuple[int, ...] = ()) -> Block:
    segment_ids = np.array(segments or [0] * len(ids), np.int32)
    labels = np.array(ids, np.int32)
    labels[np.diff(segment_ids, prepend=-1) != 0] = IGNORED
    labels[list(unlabelled)] = IGNORED
    return Block(np.array(ids, np.int32), labels, segment_ids)


BLOCKS = [
    make_block([5, 6, 7, 8], [0, 0, 1, 1]),
    make_block([9]),
    make_block([1, 2, 3, 4, 65_000], [0, 1, 1, 2, 2]),
    make_block([11, 12, 13], unlabelled=(1,)),
]


def equal(left: Block, right: Block) -> bool:
    return all(a.dtype == b.dtype == np.int32 and np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("tokens_per_shard", [1, 6, 1000])
@pytest.mark.parametrize("vocab_size", [65_536, 100_000])
def test_blocks_come_back_as_written(tmp_path: Path, tokens_per_shard: int, vocab_size: int) -> None:
    store = write_store(tmp_path / "s", BLOCKS, name="books", vocab_size=vocab_size, tokens_per_shard=tokens_per_shard)
    assert len(store) == 4
    assert all(equal(a, b) for a, b in zip(store, BLOCKS, strict=True))
    assert store.lengths.tolist() == [4, 1, 5, 3]
    assert store.label_counts.tolist() == [2, 0, 2, 1]
    assert store.manifest.label_tokens == 5
    assert store.manifest.documents == store.manifest.segments == 2 + 1 + 3 + 1
    store.verify()
    assert equal(pickle.loads(pickle.dumps(store))[2], BLOCKS[2])


def test_subset_has_the_interface_of_a_store(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", BLOCKS, name="books", vocab_size=70_000)
    view = store.subset([2, 0]).subset([1, 1])
    assert (view.name, len(view)) == ("books", 2)
    assert equal(view[1], BLOCKS[0])
    assert view.lengths.tolist() == [4, 4] and view.label_counts.tolist() == [2, 2]
    assert view.digest != store.digest != store.subset([2, 0]).digest
    assert store.subset([2, 0]).digest == store.subset(np.array([2, 0])).digest
    with pytest.raises(IndexError):
        store.subset([4])
    with pytest.raises(IndexError):
        store[-1]


def test_digest_follows_the_content_alone(tmp_path: Path) -> None:
    first = write_store(tmp_path / "a", BLOCKS, name="a", vocab_size=70_000)
    again = write_store(tmp_path / "b", BLOCKS, name="b", vocab_size=70_000)
    other_labels = [*BLOCKS[:3], make_block([11, 12, 13], unlabelled=(2,))]
    other_segments = [make_block([5, 6, 7, 8], [0, 0, 0, 1]), *BLOCKS[1:]]
    assert first.digest == again.digest
    for number, blocks in enumerate([other_labels, other_segments, BLOCKS[:3]]):
        assert write_store(tmp_path / f"c{number}", blocks, name="a", vocab_size=70_000).digest != first.digest


def test_empty_store(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [], name="none", vocab_size=10)
    assert len(store) == 0 and store.lengths.shape == store.label_counts.shape == (0,)


def test_incomplete_and_damaged_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no complete block store"):
        BlockStore.open(tmp_path / "absent")
    folder = tmp_path / "s"
    write_store(folder, BLOCKS, name="books", vocab_size=70_000)
    tokens = folder / "shard-00000" / "tokens.npy"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-4])
    with pytest.raises(DataError, match="bytes instead of"):
        BlockStore.open(folder)
    tokens.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(DataError, match="does not hold what was written"):
        BlockStore.open(folder).verify()
    tokens.unlink()
    with pytest.raises(DataError, match="is missing"):
        BlockStore.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        BlockStore.open(folder)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_folder(tmp_path / "shard-00000") as scratch:
            (scratch / "tokens.npy").write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert os.listdir(tmp_path) == []


def test_of_two_attempts_at_one_shard_the_first_stays(tmp_path: Path) -> None:
    final = tmp_path / "shard-00000"
    with atomic_folder(final) as slow:
        (slow / "x").write_text("slow")
        with atomic_folder(final) as fast:
            (fast / "x").write_text("fast")
    assert (final / "x").read_text() == "fast"
    assert os.listdir(tmp_path) == ["shard-00000"]


def test_importing_stores_and_streams_loads_neither_ray_nor_torch() -> None:
    code = (
        "import sys, isoray.corpora.stream, isoray.corpora.shards; print('ray' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
