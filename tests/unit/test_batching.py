"""How the rows of a step are cut into micro-batches."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from isoray.training.batching import RUN_COST, cut
from isoray.training.parallel import Ranks


def cheapest(lengths: np.ndarray, *, max_tokens: int, max_rows: int | None) -> int:
    """By trying every cut of the sorted rows."""
    rows = np.sort(lengths)[::-1]
    best = None
    for cuts in range(len(rows)):
        for places in combinations(range(1, len(rows)), cuts):
            runs = [rows[a:b] for a, b in pairwise([0, *places, len(rows)])]
            fits = all(len(r) == 1 or (len(r) * r[0] <= max_tokens and len(r) <= (max_rows or 99)) for r in runs)
            cost = sum(len(r) * int(r[0]) + RUN_COST for r in runs)
            if fits and (best is None or cost < best):
                best = cost
    assert best is not None
    return best


@pytest.mark.parametrize("max_rows", [None, 3])
@pytest.mark.parametrize("max_tokens", [1, 300, 10**6])
@pytest.mark.parametrize("seed", range(5))
def test_the_cut_is_the_cheapest_that_fits(seed: int, max_tokens: int, max_rows: int | None) -> None:
    lengths = np.random.default_rng(seed).integers(1, 250, 9)
    (plan,) = cut(lengths, world=1, max_tokens=max_tokens, max_rows=max_rows)
    assert sorted(row for rows in plan for row in rows if row is not None) == list(range(9))
    assert all(len(rows) <= (max_rows or 9) for rows in plan)
    cost = sum(len(rows) * max(int(lengths[row]) for row in rows if row is not None) + RUN_COST for rows in plan)
    assert cost == cheapest(lengths, max_tokens=max_tokens, max_rows=max_rows)


@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_every_rank_gets_as_many_micro_batches_and_rows(rows: int) -> None:
    lengths = np.random.default_rng(rows).integers(1, 250, rows)
    one, other, third = cut(lengths, world=3, max_tokens=400, max_rows=None)
    assert [len(part) for part in one] == [len(part) for part in other] == [len(part) for part in third]
    dealt = [row for rank in (one, other, third) for part in rank for row in part if row is not None]
    assert sorted(dealt) == list(range(rows))


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_every_part_is_dealt_once_and_what_is_missing_makes_the_shares_equal(parts: int) -> None:
    shares = [Ranks(rank, 3).deal(range(parts)) for rank in range(3)]
    assert sorted(part for mine, _ in shares for part in mine) == list(range(parts))
    assert {len(mine) + missing for mine, missing in shares} == {-(-parts // 3)}
