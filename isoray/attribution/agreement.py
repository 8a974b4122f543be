"""How well estimated influence agrees with leave-one-out truth: correlations over corpora.

The paper's metric (Isonuma & Titov 2024, Tables 3 and 5). Needs numpy only. What is not defined is None, never NaN and
never an exception: a correlation of fewer than three corpora (two always correlate by +-1), of constant scores, or with
a score that is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from isoray.attribution.vectors import Float64Array
from isoray.errors import DataError

ScoreTable = Mapping[str, Mapping[str, float]]
"""``scores[test][corpus]``; larger = more helpful."""


@dataclass(frozen=True)
class Agreement:
    """Correlation over corpora between estimated and true influence on one test set."""

    pearson: float | None
    spearman: float | None


@dataclass(frozen=True)
class Summary:
    """Agreement averaged over test sets, then its mean and standard deviation over seeds."""

    pearson_mean: float | None
    pearson_sd: float | None
    spearman_mean: float | None
    spearman_sd: float | None
    seeds: int
    tests: int
    """Test sets for which the correlation is defined under every seed; only these are averaged."""


def standardise(scores: Sequence[float]) -> list[float | None]:
    """Scores over corpora at zero mean and unit variance: the population's, which the paper's Table 2 uses.

    All None if the scores are constant, not finite or none.
    """
    centred = _centred(np.asarray(scores, dtype=np.float64))
    if centred is None:
        return [None] * len(scores)
    return [float(value) for value in centred / np.sqrt(np.mean(centred**2))]


def pearson(estimated: Sequence[float], truth: Sequence[float]) -> float | None:
    """Pearson's correlation of two score lists over the same corpora, or None where it is not defined."""
    return _correlation(np.asarray(estimated, dtype=np.float64), np.asarray(truth, dtype=np.float64))


def spearman(estimated: Sequence[float], truth: Sequence[float]) -> float | None:
    """Spearman's rank correlation (ties share their mean rank), or None where it is not defined."""
    x, y = np.asarray(estimated, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    return _correlation(_ranks(x), _ranks(y))


def agreement(estimated: ScoreTable, truth: ScoreTable) -> dict[str, Agreement]:
    """Correlations over corpora for every test set of ``estimated``. DataError if corpora differ."""
    found = {}
    for test, scores in estimated.items():
        true = truth.get(test, {})
        if scores.keys() != true.keys():
            differing = ", ".join(sorted(scores.keys() ^ true.keys()))
            raise DataError(
                f"influence on {test!r} is estimated and known for different corpora ({differing}); compute both "
                "for the same set of corpora"
            )
        pairs = [(score, true[corpus]) for corpus, score in scores.items()]
        x, y = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        found[test] = Agreement(pearson=pearson(x, y), spearman=spearman(x, y))
    return found


def summarise(seeds: Sequence[Mapping[str, Agreement]]) -> Summary:
    """Mean over test sets within each seed; over seeds, mean and sample standard deviation (None for one seed)."""
    tests = [test for test in (seeds[0] if seeds else ()) if all(seed[test].pearson is not None for seed in seeds)]
    pearson_mean, pearson_sd = _over_seeds([[seed[test].pearson for test in tests] for seed in seeds])
    spearman_mean, spearman_sd = _over_seeds([[seed[test].spearman for test in tests] for seed in seeds])
    return Summary(
        pearson_mean=pearson_mean,
        pearson_sd=pearson_sd,
        spearman_mean=spearman_mean,
        spearman_sd=spearman_sd,
        seeds=len(seeds),
        tests=len(tests),
    )


def _over_seeds(values: Sequence[Sequence[float | None]]) -> tuple[float | None, float | None]:
    means = [float(np.mean(np.array(per_test, dtype=np.float64))) for per_test in values if per_test]
    if not means:
        return None, None
    return float(np.mean(means)), float(np.std(means, ddof=1)) if len(means) > 1 else None


def _ranks(values: Float64Array) -> Float64Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place], dtype=np.float64)


def _centred(values: Float64Array) -> Float64Array | None:
    """The values less their mean, scaled to at most 1; None where they differ by rounding only or are not finite."""
    if values.size == 0 or not np.isfinite(values).all():
        return None
    centred = values - values.mean()
    largest = np.abs(centred).max()
    if largest <= 1e-13 * np.abs(values).max():
        return None
    return np.asarray(centred / largest)


def _correlation(x: Float64Array, y: Float64Array) -> float | None:
    if len(x) != len(y):
        raise DataError(f"{len(x)} scores cannot be correlated with {len(y)}; one pair per corpus was expected")
    if len(x) < 3:
        return None
    x_centred, y_centred = _centred(x), _centred(y)
    if x_centred is None or y_centred is None:
        return None
    value = x_centred @ y_centred / np.sqrt((x_centred @ x_centred) * (y_centred @ y_centred))
    return float(np.clip(value, -1.0, 1.0))
