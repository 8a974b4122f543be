"""Blocks of tokens on disk: memory-mapped arrays in shards, a manifest, and a marker that says "complete".

A store is a folder::

    manifest.json                 written last; without it the store does not exist
    shard-00000/shard.json        what the shard holds; the folder appears in one rename, so it is complete or absent
               /tokens.npy        uint16 or uint32 [tokens], all blocks one after the other
               /offsets.npy       int64 [blocks + 1], where each block starts in `tokens`
               /starts.npy        int64, where a second, third, ... segment starts inside a block
               /label_counts.npy  int32 [blocks]
               /labels.npy        bool [tokens], present only where labels are not "all but the first of a segment"

Nothing here needs torch or Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from isoray.corpora.manifest import Manifest, read_manifest
from isoray.errors import DataError

Int32Array: TypeAlias = npt.NDArray[np.int32]
IGNORED = -100
"""The label of a token that carries no loss (the Hugging Face convention)."""


class Block(NamedTuple):
    """Tokens that one row of a batch holds; int32 arrays of one length T."""

    input_ids: Int32Array
    """The tokens."""
    labels: Int32Array
    """The same tokens, or -100 where there is no loss; not shifted."""
    segment_ids: Int32Array
    """0, 1, 2, ...: the document each token belongs to; its first token carries no label."""


class Blocks(Protocol):
    """What a :class:`BlockStore` and its subsets have in common: all that a stream needs."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def lengths(self) -> Int32Array: ...
    @property
    def label_counts(self) -> Int32Array: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Block: ...


class BlockStore:
    """A complete store, opened for reading. Pickles as its path; arrays are mapped into memory when first touched."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.name = manifest.name
        self.digest = manifest.digest
        self._shards: dict[int, _Shard] = {}
        self._first = np.cumsum([0] + [shard.blocks for shard in manifest.shards])
        self.lengths: Int32Array = self._gather("offsets", np.diff)
        """int32 [blocks]: tokens in each block."""
        self.label_counts: Int32Array = self._gather("label_counts", lambda counts: counts)
        """int32 [blocks]: tokens of each block that carry a label."""

    @classmethod
    def open(cls, folder: str | Path) -> BlockStore:
        """The store in ``folder``. Raises DataError when it is absent, incomplete or damaged."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        for shard in manifest.shards:
            for name, size in shard.bytes.items():
                path = folder / shard.folder / name
                found = path.stat().st_size if path.is_file() else None
                if found != size:
                    state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                    raise DataError(f"{path} {state}: the store is damaged; delete {folder} and build it again")
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.blocks

    def __getitem__(self, index: int) -> Block:
        """Block ``index``: its arrays are fresh copies."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {self.name}, which has {len(self)}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._shard(shard).block(index - int(self._first[shard]))

    def __iter__(self) -> Iterator[Block]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockStore.open, (self.folder,)

    def __repr__(self) -> str:
        return f"BlockStore({self.name!r}, {len(self)} blocks, {self.manifest.tokens} tokens)"

    def subset(self, indices: Iterable[int] | npt.NDArray[Any]) -> BlockView:
        """A view of the blocks ``indices``, in that order."""
        return BlockView(self, indices)

    def verify(self) -> None:
        """Read everything and compare with the recorded digests. Raises DataError where they differ."""
        for number, report in enumerate(self.manifest.shards):
            shard = self._shard(number)
            if content_digest(shard.tokens, shard.offsets, shard.starts, shard.labels) != report.digest:
                raise DataError(
                    f"{self.folder / report.folder} does not hold what was written; "
                    f"delete {self.folder} and build it again"
                )

    def _shard(self, number: int) -> _Shard:
        if number not in self._shards:
            self._shards[number] = _Shard(self.folder / self.manifest.shards[number].folder)
        return self._shards[number]

    def _gather(self, name: str, compute: Any) -> Int32Array:
        parts = [compute(np.load(self.folder / shard.folder / f"{name}.npy")) for shard in self.manifest.shards]
        gathered: Int32Array = np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
        return gathered


class BlockView:
    """Some blocks of a store, with the store's interface."""

    def __init__(self, base: BlockStore | BlockView, indices: Iterable[int] | npt.NDArray[Any]) -> None:
        self.base = base
        self.indices = np.fromiter(indices, np.int64)
        outside = self.indices[(self.indices < 0) | (self.indices >= len(base))]
        if len(outside):
            raise IndexError(f"block {outside[0]} of {base.name}, which has {len(base)}")
        self.name: str = base.name
        self.digest: str = hashlib.sha256(base.digest.encode() + self.indices.tobytes()).hexdigest()
        self.lengths: Int32Array = base.lengths[self.indices]
        self.label_counts: Int32Array = base.label_counts[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of a view of {self.name}, which has {len(self)}")
        return self.base[int(self.indices[index])]

    def __iter__(self) -> Iterator[Block]:
        return (self[index] for index in range(len(self)))

    def subset(self, indices: Iterable[int] | npt.NDArray[Any]) -> BlockView:
        """A view of the blocks ``indices`` of this view, in that order."""
        return BlockView(self, indices)


class _Shard:
    """One shard's arrays, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.tokens = _map(folder / "tokens.npy")
        self.offsets = np.load(folder / "offsets.npy")
        self.starts = np.load(folder / "starts.npy")
        self.labels = _map(folder / "labels.npy") if (folder / "labels.npy").exists() else None

    def block(self, index: int) -> Block:
        """Block ``index`` of this shard; labels and segments as :class:`Block` has them."""
        begin, end = int(self.offsets[index]), int(self.offsets[index + 1])
        ids = self.tokens[begin:end].astype(np.int32)
        first, last = np.searchsorted(self.starts, [begin, end])
        starts = self.starts[first:last] - begin
        segments = np.zeros(len(ids), np.int32)
        segments[starts] = 1
        if self.labels is None:
            labels = ids.copy()
            labels[:1] = IGNORED
            labels[starts] = IGNORED
        else:
            labels = np.where(self.labels[begin:end], ids, np.int32(IGNORED))
        return Block(ids, labels, np.cumsum(segments, dtype=np.int32))


def _map(path: Path) -> npt.NDArray[Any]:
    array = np.load(path, mmap_mode=None if path.stat().st_size < 1 << 16 else "r")
    return np.asarray(array)


def content_digest(*arrays: npt.NDArray[Any] | None) -> str:
    """SHA-256 of the arrays' types, lengths and values."""
    content = hashlib.sha256()
    for array in arrays:
        if array is None:
            content.update(b"none;")
        else:
            content.update(f"{array.dtype.str}{len(array)};".encode())
            content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()
