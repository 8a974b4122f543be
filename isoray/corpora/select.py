"""Which of the tokenised documents go into a store: duplicates, `limit` and `max_tokens`, in memory that is bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from isoray.corpora.documents import Run

IDS_AT_ONCE = 1 << 24
BIN_BITS = 16


@dataclass(frozen=True)
class Cut:
    """The documents whose order key is at most ``key``; the one at ``key`` may lose its end."""

    key: int = (1 << 64) - 1
    last_tokens: int | None = None
    """How many tokens of the document at ``key`` are used; None: all."""


@dataclass
class Selection:
    """What is used of a corpus."""

    cut: Cut
    duplicates: dict[int, npt.NDArray[np.int64]]
    """By run: documents left out because an earlier one has the same id."""
    tokens: list[int] = field(default_factory=list)
    """By run: tokens used."""
    kept: Counter[int] = field(default_factory=Counter)
    """By file: documents used."""
    sampled_out: Counter[int] = field(default_factory=Counter)
    """By file: good documents not used."""
    too_short: Counter[int] = field(default_factory=Counter)
    """By file: documents of which no token could carry a label."""
    duplicated: Counter[int] = field(default_factory=Counter)
    """By file: documents whose id an earlier one has, left out or not."""
    licenses: Counter[tuple[int, int]] = field(default_factory=Counter)
    """By (run, number of the licence in its task): documents used."""
    truncated: int = 0
    """Documents longer than a block, where each makes one block."""


def order_keys(documents: npt.NDArray[Any], seed: int) -> npt.NDArray[np.uint64]:
    """uint64 [documents]: a random order that hangs on ``seed`` and on where each document stands in its file alone."""
    return mix_keys(documents["key"], seed)


def mix_keys(keys: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """uint64, the same shape: a random number for each of ``keys`` that hangs on it and on ``seed``."""
    return _mix(keys ^ _mix(np.array([seed % (1 << 64)], np.uint64)))


def usable(documents: npt.NDArray[Any], duplicates: npt.NDArray[np.int64] | None) -> npt.NDArray[np.bool_]:
    """bool [documents]: whether there is a token to predict and the document is no duplicate."""
    mask = documents["length"] > np.maximum(documents["prompt"], 1)
    if duplicates is not None:
        mask[duplicates] = False
    return np.asarray(mask, np.bool_)


def used_tokens(
    documents: npt.NDArray[Any], *, duplicates: npt.NDArray[np.int64] | None, cut: Cut, seed: int
) -> npt.NDArray[np.int64]:
    """int64 [documents]: how many tokens of each document are used, 0 where it is not."""
    keys = order_keys(documents, seed)
    used = documents["length"].astype(np.int64)
    if cut.last_tokens is not None:
        used = np.where(keys == np.uint64(cut.key), np.minimum(used, cut.last_tokens), used)
    return np.where(usable(documents, duplicates) & (keys <= np.uint64(cut.key)), used, 0)


def find_duplicates(runs: Sequence[Run]) -> dict[int, npt.NDArray[np.int64]]:
    """By run: the documents whose id an earlier document has."""
    total = sum(len(run.documents()) for run in runs)
    passes = max(1, -(-total // IDS_AT_ONCE))
    found: dict[int, list[npt.NDArray[np.int64]]] = {}
    for turn in range(passes):
        ids, places = [], []
        for number, run in enumerate(runs):
            column = run.documents()["id"]
            index = np.flatnonzero((column != 0) & ((column >> np.uint64(1)) % np.uint64(passes) == turn))
            ids.append(column[index])
            places.append(np.stack([np.full(len(index), number), index], axis=1))
        if not ids:
            continue
        every, where = np.concatenate(ids), np.concatenate(places)
        order = np.argsort(every, kind="stable")
        later = order[1:][every[order][1:] == every[order][:-1]]
        for number in np.unique(where[later, 0]):
            found.setdefault(int(number), []).append(where[later][where[later, 0] == number, 1])
    return {number: np.sort(np.concatenate(parts)) for number, parts in found.items()}


def find_cut(
    runs: Sequence[Run],
    duplicates: dict[int, npt.NDArray[np.int64]],
    *,
    seed: int,
    limit: int | None,
    max_tokens: int | None,
    longest: int | None,
) -> Cut:
    """The cut that keeps ``limit`` documents and ``max_tokens`` tokens.

    ``longest``: where each document makes one block, its greatest length; documents then stay whole.
    """

    def measured() -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
        for number, run in enumerate(runs):
            documents = run.documents()
            documents = documents[usable(documents, duplicates.get(number))]
            lengths = documents["length"].astype(np.int64)
            yield order_keys(documents, seed), lengths if longest is None else np.minimum(lengths, longest)

    cut = Cut()
    if limit is not None:
        cut = _cut_at(lambda: ((keys, np.ones_like(lengths)) for keys, lengths in measured()), limit, whole=True)
    if max_tokens is not None:
        budget = _cut_at(measured, max_tokens, whole=longest is not None)
        cut = min(cut, budget, key=lambda one: (one.key, one.last_tokens is None))
    return cut


def _cut_at(
    measured: Callable[[], Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]]], budget: int, *, whole: bool
) -> Cut:
    """The documents of smallest key that fill ``budget``: a histogram of keys first, then its decisive bin exactly."""
    shift = np.uint64(64 - BIN_BITS)
    histogram = np.zeros(1 << BIN_BITS, np.int64)
    for keys, sizes in measured():
        np.add.at(histogram, (keys >> shift).astype(np.int64), sizes)
    filled = np.cumsum(histogram)
    if filled[-1] <= budget:
        return Cut()
    last = int(np.searchsorted(filled, budget))
    parts = [
        (keys[inside], sizes[inside])
        for keys, sizes in measured()
        for inside in [(keys >> shift).astype(np.int64) == last]
    ]
    keys, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    remaining = budget - int(filled[last] - histogram[last])
    reached = np.cumsum(sizes[order])
    place = int(np.searchsorted(reached, remaining))
    if reached[place] == remaining:
        return Cut(int(keys[order[place]]))
    if whole:
        return Cut(int(keys[order[place]]) - 1)
    return Cut(int(keys[order[place]]), remaining - int(reached[place - 1] if place else 0))


def select(
    runs: Sequence[Run],
    *,
    seed: int,
    limit: int | None,
    max_tokens: int | None,
    longest: int | None,
    unique_ids: bool,
) -> Selection:
    """What is used of ``runs``. ``longest`` is the block length where each document makes one block, else None."""
    found = find_duplicates(runs)
    duplicates = found if unique_ids else {}
    cut = find_cut(runs, duplicates, seed=seed, limit=limit, max_tokens=max_tokens, longest=longest)
    selection = Selection(cut, duplicates)
    for number, run in enumerate(runs):
        documents = run.documents()
        dropped = duplicates.get(number)
        used = used_tokens(documents, duplicates=dropped, cut=cut, seed=seed)
        good = usable(documents, dropped)
        short = ~usable(documents, None)
        if dropped is not None:
            short[dropped] = False
        files = documents["file"]
        selection.tokens.append(int(used.sum()))
        selection.kept.update(_count(files[used > 0]))
        selection.sampled_out.update(_count(files[good & (used == 0)]))
        selection.too_short.update(_count(files[short]))
        selection.duplicated.update(_count(files[found.get(number, np.zeros(0, np.int64))]))
        selection.licenses.update({(number, name): n for name, n in _count(documents["license"][used > 0]).items()})
        if longest is not None:
            selection.truncated += int((used > longest).sum())
    return selection


def _count(values: npt.NDArray[Any]) -> dict[int, int]:
    numbers, counts = np.unique(values, return_counts=True)
    return {int(number): int(count) for number, count in zip(numbers, counts, strict=True)}


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64: a bijection of 64-bit numbers that looks random."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
