"""Writing block stores: each shard appears in one rename, the manifest last."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from isoray.corpora.manifest import MANIFEST, Manifest, ShardReport
from isoray.corpora.pack import carries_label, count_labels
from isoray.corpora.store import IGNORED, Block, BlockStore, content_digest

TOKENS_PER_SHARD = 1 << 24


def write_shard(
    folder: Path,
    number: int,
    *,
    tokens: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    labels: npt.NDArray[np.bool_] | None = None,
    vocab_size: int,
    extra: Mapping[str, npt.NDArray[Any]] | None = None,
) -> ShardReport:
    """Write shard ``number`` of the store in ``folder``; it appears in one rename.

    ``tokens`` [T] integers; ``offsets`` [blocks + 1]; ``starts``: sorted positions in ``tokens`` at which a segment
    other than a block's first starts; ``labels`` bool [T], or None for "all but the first token of each segment".
    The first token of a segment never carries a label. ``extra`` arrays are kept beside the others.
    """
    tokens = tokens.astype(token_dtype(vocab_size), copy=False)
    counts = count_labels(offsets, starts, labels)
    segments = int((np.diff(offsets) > 0).sum()) + len(starts)
    arrays = {"tokens": tokens, "offsets": offsets, "starts": starts, "label_counts": counts}
    if labels is not None and int(counts.sum()) == len(tokens) - segments:
        labels = None
    if labels is not None:
        labels = arrays["labels"] = carries_label(offsets, starts, labels)
    arrays.update(extra or {})
    final = folder / f"shard-{number:05d}"
    with atomic_folder(final) as scratch:
        for name, array in arrays.items():
            np.save(scratch / f"{name}.npy", array)
        report = ShardReport(
            folder=final.name,
            blocks=len(offsets) - 1,
            tokens=len(tokens),
            label_tokens=int(counts.sum()),
            segments=segments,
            digest=content_digest(tokens, offsets, starts, labels),
            bytes={f"{name}.npy": (scratch / f"{name}.npy").stat().st_size for name in arrays},
        )
        (scratch / "shard.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    return report


def read_shard_report(folder: Path, number: int) -> ShardReport | None:
    """What shard ``number`` holds when it is already complete, else None."""
    path = folder / f"shard-{number:05d}" / "shard.json"
    return ShardReport.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


def commit_store(folder: Path, shards: Sequence[ShardReport], **fields: Any) -> BlockStore:
    """Write the manifest over complete ``shards`` (with the Manifest's other ``fields``) and open the store."""
    digest = hashlib.sha256("".join(shard.digest for shard in shards).encode()).hexdigest()
    manifest = Manifest(
        digest=digest,
        blocks=sum(shard.blocks for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        label_tokens=sum(shard.label_tokens for shard in shards),
        segments=sum(shard.segments for shard in shards),
        shards=tuple(shards),
        **fields,
    )
    with atomic_file(folder / MANIFEST) as stream:
        stream.write(json.dumps(manifest.model_dump(mode="json"), indent=1).encode())
    return BlockStore.open(folder)


def write_store(
    folder: str | Path,
    blocks: Iterable[Block],
    *,
    name: str,
    vocab_size: int,
    documents: int | None = None,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    **fields: Any,
) -> BlockStore:
    """Write ``blocks`` as a complete store and open it; memory stays bounded by one shard.

    ``documents`` is the number of segments unless given; ``fields`` are further fields of the Manifest.
    """
    folder = Path(folder)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    shards: list[ShardReport] = []
    pending: list[Block] = []
    tokens = 0
    for block in blocks:
        pending.append(block)
        tokens += len(block.input_ids)
        if tokens >= tokens_per_shard:
            shards.append(_write_blocks(folder, len(shards), pending, vocab_size))
            pending, tokens = [], 0
    if pending:
        shards.append(_write_blocks(folder, len(shards), pending, vocab_size))
    fields["documents"] = sum(shard.segments for shard in shards) if documents is None else documents
    return commit_store(folder, shards, name=name, **fields)


def _write_blocks(folder: Path, number: int, blocks: Sequence[Block], vocab_size: int) -> ShardReport:
    segments = np.concatenate([block.segment_ids for block in blocks])
    offsets = np.cumsum([0] + [len(block.input_ids) for block in blocks], dtype=np.int64)
    changes = np.flatnonzero(np.diff(segments, prepend=segments[:1]) != 0)
    return write_shard(
        folder,
        number,
        tokens=np.concatenate([block.input_ids for block in blocks]),
        offsets=offsets,
        starts=np.setdiff1d(changes, offsets),
        labels=np.concatenate([block.labels for block in blocks]) != IGNORED,
        vocab_size=vocab_size,
    )


def token_dtype(vocab_size: int) -> npt.DTypeLike:
    """The smallest unsigned type that holds every token id: uint16 or uint32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``final`` in one rename when the body ends, and vanishes when it fails.

    When another attempt at the same work was faster, ``final`` stays as that attempt left it.
    """
    scratch = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        try:
            scratch.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(final: Path) -> Iterator[BinaryIO]:
    """A scratch file that becomes ``final`` in one rename when the body ends, and vanishes when it fails."""
    scratch = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    try:
        with scratch.open("wb") as stream:
            yield stream
        os.replace(scratch, final)
    finally:
        scratch.unlink(missing_ok=True)
