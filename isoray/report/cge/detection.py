"""Given examples, ranked by how new they are: AUROC of each score as charts, table and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from isoray.report.cge.results import LEVEL
from isoray.report.cge.sureness import percent
from isoray.report.estimates import Estimate, interval_panel
from isoray.report.numbers import count, finite, num, plain, short, span
from isoray.report.sentences import Finding
from isoray.report.svg import Style

PANELS = 6
"""Most charts of the detection."""
SCORES = {
    "contrast": "Contrast",
    "unlikely_to_base": "Unlikely before",
    "likely_to_tuned": "Likely after",
    "gradient_norm": "Gradient norm",
}


def panels(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """AUROC of each score with its interval: over all new kinds, and for the first few of them."""
    kinds = list(dict.fromkeys(map(kind_of, rows)))
    found = []
    for kind in kinds[:PANELS]:
        mine = [row for row in rows if kind_of(row) == kind and finite(row.get("auroc")) is not None]
        if not mine:
            continue
        name = kind_name(kind)
        told = "; ".join(f"{score_name(row)} {plain(finite(row.get('auroc')), 3)}" for row in mine)
        text_ = f"AUROC of each score, {name}: {told}"
        estimates = [_estimate(row) for row in mine]
        found.append((name, interval_panel(estimates, label=text_, low=0.0, high=1.0, measured="often ranked first")))
    return found


def kind_of(row: Mapping[str, Any]) -> str | None:
    """The kind of examples that a row is about; None: all new ones."""
    kind = row.get("of")
    return kind if isinstance(kind, str) else None


def kind_name(kind: str | None) -> str:
    """A kind's name for people."""
    return "All new kinds" if kind is None else kind


def score_name(row: Mapping[str, Any]) -> str:
    """A score's name for people."""
    return SCORES.get(str(row.get("score")), str(row.get("score")))


def _estimate(row: Mapping[str, Any]) -> Estimate:
    value, low, high = (finite(row.get(name)) for name in ("auroc", "low", "high"))
    between = f", {LEVEL} interval {short(low)} to {short(high)}" if low is not None and high is not None else ""
    ours = row.get("score") == "contrast"
    style = Style("ours", 0) if ours else Style("s7", 1)
    return Estimate(
        score_name(row), style, value, low, high, f"{score_name(row)}: {short(value)}{between}", strong=ours
    )


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row for each score, a column for all new kinds and for each."""
    kinds = list(dict.fromkeys(map(kind_of, rows)))
    by_place = {(score_name(row), kind_of(row)): row for row in rows}
    scores = {score_name(row): row.get("score") for row in rows}
    sizes = [_sizes(next(row for row in rows if kind_of(row) == kind)) for kind in kinds]
    told_rows = [
        {
            "name": name,
            "ours": score == "contrast",
            "cells": [_auroc(by_place.get((name, kind), {})) for kind in kinds],
        }
        for name, score in scores.items()
    ]
    return {"kinds": list(zip(map(kind_name, kinds), sizes, strict=True)), "rows": told_rows}


def _sizes(row: Mapping[str, Any]) -> Markup:
    return Markup("{} new, {} familiar").format(count(row.get("new")), count(row.get("familiar")))


def _auroc(row: Mapping[str, Any]) -> Markup:
    low, high = finite(row.get("low")), finite(row.get("high"))
    between = Markup("")
    if low is not None and high is not None:
        between = Markup('<small class="ci" title="{!r} to {!r}">{}</small>').format(low, high, span(low, high))
    return num(row.get("auroc"), 3) + between


def findings(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """How well the contrast does, and whether a simpler score does as well: shown if their intervals do not meet."""
    every = {
        str(row.get("score")): row for row in rows if kind_of(row) is None and finite(row.get("auroc")) is not None
    }
    mine = every.pop("contrast", None)
    if mine is None:
        return []
    value, low, high = (finite(mine.get(name)) for name in ("auroc", "low", "high"))
    between = f" ({LEVEL} interval {span(low, high)})" if low is not None and high is not None else ""
    text = Markup("The contrast ranks a new example above a familiar one in {} of the pairs{}. Chance is 50%.")
    sound = low is not None and low > 0.5
    told = [Finding("good" if sound else "warn", text.format(percent(value), between))]
    if not every:
        return told
    best = max(every.values(), key=lambda row: finite(row.get("auroc")) or 0.0)
    theirs, their_low, their_high = (finite(best.get(name)) for name in ("auroc", "low", "high"))
    said = Markup("The best of the simpler scores, <b>{}</b>, reaches {}: ").format(score_name(best), plain(theirs, 3))
    if low is not None and their_high is not None and low > their_high:
        return [*told, Finding("good", said + Markup("the contrast does better."))]
    if high is not None and their_low is not None and their_low > high:
        return [*told, Finding("bad", said + Markup("it does better than the contrast."))]
    return [*told, Finding("warn", said + Markup("the contrast is <em>not</em> shown to do better."))]
