"""The second half of building: windows of tokenised documents are shuffled, packed and written as shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isoray.corpora.documents import Run
from isoray.corpora.manifest import ShardReport
from isoray.corpora.pack import (
    Cuts,
    Flat,
    flatten,
    gather,
    join,
    one_per_block,
    pack,
    with_rest,
    without_unlabelled,
)
from isoray.corpora.select import Cut, order_keys, used_tokens
from isoray.corpora.shards import atomic_file, read_shard_report, write_shard

WINDOW_TOKENS = 1 << 24
ORIGIN = np.dtype([("file", "<u4"), ("license", "<u2"), ("position", "<i8"), ("tokens", "<u4"), ("digest", "V16")])
"""`origins.npy` of a shard: where each document of its window came from (file and licence by number in the manifest),
how many tokens of it are used, and the BLAKE2b of its text; in the order in which the blocks hold them."""


@dataclass(frozen=True)
class Window:
    """Some consecutive runs, and all that decides what becomes of their documents."""

    number: int
    runs: tuple[Run, ...]
    duplicates: tuple[npt.NDArray[np.int64] | None, ...]
    """By run: documents that are left out."""
    licenses: tuple[Mapping[int, int], ...]
    """By run: from the number of a licence in its task to its number in the manifest."""
    cut: Cut
    seed: int
    shuffle: bool
    length: int
    packed: bool
    prefix: int
    """Special tokens at the beginning of each document."""
    keep_rest: bool
    """Whether tokens that fill no block become a shorter one here; else they are put aside for :func:`write_rest`."""
    vocab_size: int
    folder: Path
    """Where the store is built."""


def write_window(window: Window) -> ShardReport:
    """Write the window's shard; written already, only its report is read."""
    done = read_shard_report(window.folder, window.number)
    if done is not None:
        return done
    tokens, documents = _documents_of(window)
    lengths, prompts = documents["tokens"].astype(np.int64), documents["prompt"].astype(np.int64)
    if window.packed:
        cuts, rest = pack(flatten(tokens, lengths, prompts), window.length)
        if window.keep_rest:
            cuts = with_rest(cuts, rest)
        else:
            _save_rest(rest_path(window.folder, window.number), rest)
    else:
        cuts = one_per_block(tokens, lengths, prompts, length=window.length, prefix=window.prefix)
    return _write(window.folder, window.number, cuts, window.vocab_size, documents[list(ORIGIN.names or ())])


def write_rest(folder: Path, windows: int, *, length: int, keep: bool, vocab_size: int) -> ShardReport | None:
    """Pack what the windows' last blocks left over into one more shard; None when nothing is left."""
    done = read_shard_report(folder, windows)
    if done is not None:
        return done
    cuts, rest = pack(join([_load_rest(rest_path(folder, number)) for number in range(windows)]), length)
    if keep:
        cuts = with_rest(cuts, rest)
    if not len(cuts.tokens):
        return None
    return _write(folder, windows, cuts, vocab_size, np.zeros(0, ORIGIN))


def rest_path(folder: Path, number: int) -> Path:
    """Where a window leaves the tokens that fill no whole block."""
    return folder / "documents" / f"rest-{number:05d}.npz"


def _write(folder: Path, number: int, cuts: Cuts, vocab_size: int, origins: npt.NDArray[Any]) -> ShardReport:
    cuts = without_unlabelled(cuts)
    return write_shard(
        folder,
        number,
        tokens=cuts.tokens,
        offsets=cuts.offsets,
        starts=cuts.starts,
        labels=cuts.labels,
        vocab_size=vocab_size,
        extra={"origins": origins.astype(ORIGIN)},
    )


def _documents_of(window: Window) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The window's documents in their final order: tokens [T] and records [documents] (ORIGIN and `prompt`)."""
    parts, records, keys, begins = [], [], [], []
    offset = 0
    fields = [*((name, ORIGIN[name]) for name in ORIGIN.names or ()), ("prompt", "<u4")]
    for run, duplicates, licenses in zip(window.runs, window.duplicates, window.licenses, strict=True):
        documents, tokens = run.documents(), run.tokens()
        used = used_tokens(documents, duplicates=duplicates, cut=window.cut, seed=window.seed)
        chosen = np.flatnonzero(used)
        starts = (np.cumsum(documents["length"], dtype=np.int64) - documents["length"])[chosen]
        record = np.zeros(len(chosen), fields)
        for name in ("file", "position", "digest", "prompt"):
            record[name] = documents[name][chosen]
        record["license"] = [licenses[int(number)] for number in documents["license"][chosen]]
        record["tokens"] = used[chosen]
        parts.append(gather(tokens, starts, used[chosen]))
        begins.append(offset + np.cumsum(used[chosen]) - used[chosen])
        offset += len(parts[-1])
        records.append(record)
        keys.append(order_keys(documents, window.seed)[chosen])
    tokens, documents = np.concatenate(parts), np.concatenate(records)
    if not window.shuffle:
        return tokens, documents
    order = np.argsort(np.concatenate(keys), kind="stable")
    lengths = documents["tokens"].astype(np.int64)
    return gather(tokens, np.concatenate(begins)[order], lengths[order]), documents[order]


def _save_rest(path: Path, rest: Flat) -> None:
    labels = np.ones(len(rest.tokens), np.bool_) if rest.labels is None else rest.labels
    with atomic_file(path) as stream:
        np.savez(stream, tokens=rest.tokens, starts=rest.starts, labels=labels)


def _load_rest(path: Path) -> Flat:
    with np.load(path) as arrays:
        return Flat(arrays["tokens"], arrays["starts"], arrays["labels"])
