"""Numbers and charts of the report against obvious references."""

from __future__ import annotations

import itertools
import math
import random
import re

import numpy as np
import pytest

from isoray.report import charts, numbers, svg
from isoray.report.charts import BarRow, Line, Mark, Point
from isoray.report.svg import Style

STYLE = Style("s0")


def coordinates(picture: str) -> list[float]:
    """All numbers in the paths of a chart."""
    return [float(n) for d in re.findall(r' d="([^"]*)"', picture) for n in re.findall(r"-?[\d.]+(?:e-?\d+)?", d)]


@pytest.mark.parametrize("n", [2, 3, 8, 50])
def test_correlations_match_numpy(n: int) -> None:
    rng = random.Random(n)
    xs = [rng.gauss(0, 1) for _ in range(n)]
    ys = [x + rng.gauss(0, 1) for x in xs]
    assert numbers.pearson(xs, ys) == pytest.approx(np.corrcoef(xs, ys)[0, 1], abs=1e-12)
    ranks = [sorted(v).index(x) for v in (xs, ys) for x in v]
    assert numbers.spearman(xs, ys) == pytest.approx(np.corrcoef(ranks[:n], ranks[n:])[0, 1], abs=1e-12)


def test_spearman_gives_ties_their_average_rank() -> None:
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
    expected = np.corrcoef([0, 1.5, 1.5, 3], [0, 1, 2, 3])[0, 1]
    assert numbers.spearman([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(expected)


def test_correlation_with_a_constant_is_unknown() -> None:
    assert numbers.pearson([1, 1, 1], [1, 2, 3]) is None
    assert numbers.pearson([1], [1]) is None


@pytest.mark.parametrize("pairs", [3, 4, 8, 12, 30])
def test_critical_correlation_is_exceeded_once_in_twenty_times(pairs: int) -> None:
    rng = np.random.default_rng(0)
    xs, ys = rng.standard_normal((2, 40_000, pairs))
    xs -= xs.mean(1, keepdims=True)
    ys -= ys.mean(1, keepdims=True)
    r = (xs * ys).sum(1) / np.sqrt((xs**2).sum(1) * (ys**2).sum(1))
    assert np.mean(np.abs(r) > numbers.critical_pearson(pairs)) == pytest.approx(0.05, abs=0.006)


def test_numbers_are_rounded_and_exact_on_hover() -> None:
    assert numbers.num(-0.123456789) == '<span title="-0.123456789">−0.12</span>'
    assert "−" not in numbers.plain(-0.001)
    assert numbers.num(float("nan")) == numbers.num(None) == numbers.NOTHING
    assert "&lt;0.01" in numbers.plus_minus(0.5, 0.001)
    assert "±" not in numbers.plus_minus(0.5, None)


@pytest.mark.parametrize(
    ("seconds", "spoken"),
    [(0.44, "0.4 s"), (9.97, "10 s"), (59.7, "1 min 00 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations_as_spoken(seconds: float, spoken: str) -> None:
    assert numbers.spoken_duration(seconds) == spoken


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-2.2, 2.2), (1e-9, 3e-9), (3, 12_345), (-1, 0.999)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = svg.nice_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in ticks)


def test_log_ticks_are_inside() -> None:
    assert svg.log_ticks(0.9, 120) == [1, 2, 5, 10, 20, 50, 100]
    assert svg.log_ticks(1, 1e6) == [10.0**d for d in range(7)]


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [0.9430000000000001, 0.943, 0.943], [2, 500, 1e30], [0, -1, 5]])
def test_lines_stay_inside_the_picture(values: list[float]) -> None:
    lines = [Line(STYLE, "a", list(enumerate(values))), Line(STYLE, "b", [(0, values[0])])]
    picture = charts.line_panel(lines, label="losses", x_name="steps", y_name="loss")
    assert all(-1 <= number <= svg.WIDTH for number in coordinates(picture))


def test_end_names_do_not_overlap() -> None:
    lines = [Line(STYLE, f"corpus {i}", [(0, 1.0), (10, 5 + 0.001 * i)]) for i in range(12)]
    picture = charts.line_panel(lines, label="losses", x_name="steps", y_name="loss")
    heights = sorted(float(y) for y in re.findall(r'class="endname" x="[\d.]+" y="([\d.]+)"', picture))
    assert len(heights) == 12
    assert all(b - a >= 12.9 for a, b in itertools.pairwise(heights))


def test_bars_are_as_long_as_their_values() -> None:
    rows = [BarRow(f"c{v}", [Mark(STYLE, v, "t", sd=0.1)]) for v in (-1.0, 0.5, 2.0)]
    picture = charts.bar_panel(rows, label="scores", low=-2, high=2)
    widths = [float(w) for w in re.findall(r'<rect[^>]*width="([\d.]+)"', picture)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.01)
    assert widths[2] / widths[1] == pytest.approx(4, rel=0.01)


def test_scatter_puts_helpful_points_up_and_to_the_right() -> None:
    points = [Point(STYLE, -1, -1, "low"), Point(STYLE, 1, 1, "high")]
    picture = charts.scatter_panel(points, label="scatter", reach=2, x_name="truth", y_name="UnTrac")
    (x1, y1), (x2, y2) = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', picture)
    assert float(x2) > float(x1) and float(y2) < float(y1)


def test_thinning_keeps_the_mean_and_the_last_step() -> None:
    points = [(float(i), math.sin(i)) for i in range(800)]
    thin = charts.thin(points, 80)
    assert len(thin) == 80
    assert thin[-1][0] == 799
    assert sum(v for _, v in thin) / 80 == pytest.approx(sum(v for _, v in points) / 800)


def test_styles_are_distinct_beyond_the_palette() -> None:
    made = svg.styles([f"c{i}" for i in range(20)])
    assert len(set(made.values())) == 20


def test_clipping_keeps_both_ends() -> None:
    assert svg.clip("similar_different", 12) == "similar…rent"
    assert svg.clip("short", 12) == "short"
