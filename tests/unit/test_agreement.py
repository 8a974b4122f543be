"""Agreement of estimated and true influence: against scipy, the paper's own table, and degenerate input."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from isoray.attribution.agreement import Agreement, agreement, pearson, spearman, standardise, summarise
from isoray.errors import DataError


def test_correlations_equal_scipys_with_ties_and_any_scale() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-12, 1.0, 1e12):
        x = rng.integers(0, 4, size=8) * scale
        y = rng.normal(size=8) / scale
        assert pearson(list(x), list(y)) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
        assert spearman(list(x), list(y)) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize(
    "column",
    [
        [1.416, 0.462, -1.031, -0.847],  # truth, synthetic A
        [1.150, 0.837, -1.025, -0.962],  # truth, synthetic B
        [1.688, -0.212, -0.651, -0.826],  # UnTrac-Inv, synthetic A
    ],
)
def test_standardise_reproduces_the_papers_table(column: list[float]) -> None:
    raw = [3.7 * value + 11.0 for value in column]
    assert standardise(raw) == pytest.approx(column, abs=1.5e-3)


def test_standardise_has_zero_mean_and_unit_population_variance() -> None:
    values = np.array(standardise([1.0, 5.0, -2.0, 4.0, 4.5]), dtype=float)
    assert values.mean() == pytest.approx(0.0, abs=1e-12)
    assert values.std(ddof=0) == pytest.approx(1.0)


@pytest.mark.parametrize("scores", [[], [2.0], [0.1, 0.1, 0.1], [1.0, float("nan"), 2.0], [1.0, float("inf"), 2.0]])
def test_standardise_of_undefined_is_none(scores: list[float]) -> None:
    assert standardise(scores) == [None] * len(scores)


@pytest.mark.parametrize(
    ("estimated", "truth"),
    [
        ([], []),
        ([1.0], [2.0]),
        ([1.0, 2.0], [1.0, 2.0]),
        ([0.1 + 0.2, 0.3, 0.3], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
        ([1.0, float("nan"), 3.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [1.0, float("inf"), 3.0]),
    ],
)
def test_undefined_correlations_are_none(estimated: list[float], truth: list[float]) -> None:
    assert pearson(estimated, truth) is None
    if estimated != [0.1 + 0.2, 0.3, 0.3]:  # ranks do not know that the difference is rounding
        assert spearman(estimated, truth) is None


def test_agreement_pairs_scores_by_corpus_not_by_order() -> None:
    truth = {"toxic": {"a": 1.0, "b": 2.0, "c": 4.0}}
    estimated = {"toxic": {"c": 8.0, "a": 2.0, "b": 4.0}}
    found = agreement(estimated, truth)["toxic"]
    assert found.pearson == pytest.approx(1.0)
    assert found.spearman == pytest.approx(1.0)


def test_agreement_over_different_corpora_is_refused() -> None:
    with pytest.raises(DataError, match="c"):
        agreement({"toxic": {"a": 1.0, "b": 2.0}}, {"toxic": {"a": 1.0, "b": 2.0, "c": 3.0}})
    with pytest.raises(DataError):
        agreement({"toxic": {"a": 1.0}}, {})


def test_summary_averages_tests_then_seeds() -> None:
    seeds = [
        {"x": Agreement(0.1, 0.2), "y": Agreement(0.5, 0.6), "z": Agreement(None, None)},
        {"x": Agreement(0.3, 0.4), "y": Agreement(0.9, 0.0), "z": Agreement(0.7, 0.7)},
    ]
    summary = summarise(seeds)
    assert (summary.seeds, summary.tests) == (2, 2)
    assert summary.pearson_mean == pytest.approx((0.3 + 0.6) / 2)
    assert summary.pearson_sd == pytest.approx(np.std([0.3, 0.6], ddof=1))
    assert summary.spearman_mean == pytest.approx((0.4 + 0.2) / 2)


def test_summary_of_little_is_none_not_a_crash() -> None:
    one = summarise([{"x": Agreement(0.1, 0.2)}])
    assert one.pearson_mean == pytest.approx(0.1)
    assert one.pearson_sd is None
    assert summarise([]).pearson_mean is None
    assert summarise([{"x": Agreement(None, None)}]).spearman_mean is None
