"""Choosing documents: budgets met exactly, duplicates found across runs, the same however documents are grouped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from isoray.corpora import select as module
from isoray.corpora.documents import DOCUMENT, Run
from isoray.corpora.select import find_cut, find_duplicates, order_keys, select, used_tokens

SEED = 5


def make_documents(count: int = 400, seed: int = 0) -> npt.NDArray[Any]:
    draw = np.random.default_rng(seed)
    documents = np.zeros(count, DOCUMENT)
    documents["key"] = draw.integers(0, 1 << 63, count, dtype=np.uint64) * np.uint64(2)
    documents["length"] = draw.integers(1, 50, count)
    documents["id"] = draw.integers(0, 300, count)
    documents["file"] = draw.integers(0, 3, count)
    return documents


def as_runs(documents: npt.NDArray[Any], folder: Path, borders: list[int]) -> list[Run]:
    runs = []
    for number, part in enumerate(np.split(documents, borders)):
        path = folder / f"documents-{number}-{len(borders)}.npy"
        np.save(path, part)
        runs.append(Run(Path("unused"), path))
    return runs


def amounts(documents: npt.NDArray[Any], runs: list[Run], **fields: Any) -> list[int]:
    """Tokens used of each document."""
    cut = find_cut(runs, {}, seed=SEED, **{"limit": None, "max_tokens": None, "longest": None, **fields})
    return used_tokens(documents, duplicates=None, cut=cut, seed=SEED).tolist()


def reference(documents: npt.NDArray[Any], budget: int, *, sizes: npt.NDArray[Any], whole: bool) -> list[int]:
    """Documents in random order until the budget of ``sizes`` is spent."""
    used = [0] * len(documents)
    for index in np.argsort(order_keys(documents, SEED)):
        if documents["length"][index] < 2:
            continue
        if sizes[index] > budget:
            used[index] = 0 if whole else budget
            break
        used[index] = int(documents["length"][index])
        budget -= int(sizes[index])
    return used


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("borders", [[], [0, 1, 200, 399]])
@pytest.mark.parametrize("budget", [1, 49, 1000, 5001, 10**6])
def test_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, borders: list[int], bits: int) -> None:
    monkeypatch.setattr(module, "BIN_BITS", bits)
    documents = make_documents()
    runs = as_runs(documents, tmp_path, borders)
    lengths = documents["length"].astype(int)
    exact = amounts(documents, runs, max_tokens=budget)
    assert exact == reference(documents, budget, sizes=lengths, whole=False)
    assert sum(exact) == min(budget, lengths[lengths > 1].sum())
    short = np.minimum(lengths, 20)
    assert amounts(documents, runs, max_tokens=budget, longest=20) == reference(
        documents, budget, sizes=short, whole=True
    )
    ones = np.ones_like(lengths)
    assert amounts(documents, runs, limit=budget) == reference(documents, budget, sizes=ones, whole=True)


def test_of_two_budgets_the_smaller_holds(tmp_path: Path) -> None:
    documents = make_documents()
    runs = as_runs(documents, tmp_path, [100])
    few_rows = amounts(documents, runs, limit=10)
    few_tokens = amounts(documents, runs, max_tokens=100)
    assert amounts(documents, runs, limit=10, max_tokens=10**5) == few_rows
    assert amounts(documents, runs, limit=300, max_tokens=100) == few_tokens


def test_samples_grow_with_the_budget_and_change_with_the_seed() -> None:
    documents = make_documents()
    assert not np.array_equal(np.argsort(order_keys(documents, 1)), np.argsort(order_keys(documents, 2)))
    assert len(np.unique(order_keys(documents, 1))) == len(documents)
    order_keys(documents, -1)  # any integer is a seed


@pytest.mark.parametrize("at_once", [50, 1 << 24])
def test_duplicates_are_found_across_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(module, "IDS_AT_ONCE", at_once)
    documents = make_documents()
    borders = [37, 200, 201]
    seen: set[int] = set()
    expected = []
    for index, identity in enumerate(documents["id"].tolist()):
        if identity and identity in seen:
            expected.append(index)
        seen.add(identity)
    firsts = [0, *borders]
    found = find_duplicates(as_runs(documents, tmp_path, borders))
    assert sorted(firsts[run] + i for run, indices in found.items() for i in indices.tolist()) == expected


def test_every_document_is_accounted_for(tmp_path: Path) -> None:
    documents = make_documents()
    runs = as_runs(documents, tmp_path, [10, 300])
    for unique in (False, True):
        chosen = select(runs, seed=SEED, limit=100, max_tokens=None, longest=None, unique_ids=unique)
        lost = chosen.duplicated if unique else {}
        assert sum(chosen.kept.values()) == 100
        for file in range(3):
            total = chosen.kept[file] + chosen.sampled_out[file] + chosen.too_short[file] + lost.get(file, 0)
            assert total == (documents["file"] == file).sum()
        assert sum(chosen.licenses.values()) == 100
