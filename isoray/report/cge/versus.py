"""The method that findings are told from, held against the others on the known domains.

With several explorations by each method, two counts differ if their difference is larger than its own spread: the root
of the sum of both variances. With one exploration nothing is known of the spread, so no method is called better.
"""

from __future__ import annotations

import math
from typing import Literal

from markupsafe import Markup

from isoray.report.cge.results import Exploration, label
from isoray.report.cge.sureness import percent
from isoray.report.numbers import finite, plain
from isoray.report.sentences import Finding, join, names

Outcome = Literal["more", "alike", "fewer", "unsure more", "unsure alike", "unsure fewer"]


def found_words(explored: Exploration, method: str) -> str:
    """``7.2 ± 0.8``, or ``2`` of one exploration."""
    mean, sd = explored.found(method)
    if mean is None:
        return "an unknown number"
    exact = sd in (None, 0.0) and abs(mean - round(mean)) < 1e-6
    return plain(mean, 0 if exact else 1) + ("" if sd is None else f"\u00a0\u00b1\u00a0{plain(sd, 0 if exact else 1)}")


def compare(explored: Exploration, other: str) -> Outcome | None:
    """Whether the main method found more domains than another; None where either is not known."""
    (mine, my_sd), (theirs, their_sd) = explored.found(explored.main), explored.found(other)
    if mine is None or theirs is None:
        return None
    gap = mine - theirs
    if my_sd is None or their_sd is None:
        return "unsure alike" if abs(gap) < 1e-9 else "unsure more" if gap > 0 else "unsure fewer"
    if abs(gap) <= max(math.hypot(my_sd, their_sd), 1e-9):
        return "alike"
    return "more" if gap > 0 else "fewer"


def against_others(explored: Exploration) -> list[Finding]:
    """A sentence for each outcome of the comparisons, and one for domains that were never found."""
    if not explored.domains or explored.found(explored.main)[0] is None:
        return []
    others = [method for method in explored.methods if method != explored.main]
    outcomes = {method: outcome for method in others if (outcome := compare(explored, method)) is not None}
    findings = []
    for outcome in dict.fromkeys(outcomes.values()):
        mine = [method for method, its in outcomes.items() if its == outcome]
        findings.append(_told(explored, outcome, mine))
    if any(outcome.startswith("unsure") for outcome in outcomes.values()):
        text = "With one exploration by a method it is not known how far chance decides, so none is shown to be better."
        findings.append(Finding("info", Markup(text)))
    if not outcomes:
        text = "No other method was run beside it, so nothing tells whether something simpler finds as much."
        findings.append(Finding("info", Markup(text)))
    return [*findings, *_never_found(explored), *_precision(explored)]


def _told(explored: Exploration, outcome: Outcome, methods: list[str]) -> Finding:
    us = label(explored.main)
    them = join([Markup("<b>{}</b> ({})").format(label(m), found_words(explored, m)) for m in methods])
    if outcome == "more":
        return Finding("good", Markup("{} found more of the known domains than {}.").format(us, them))
    if outcome == "alike":
        text = (
            "{} did <em>not</em> find more of the known domains than {}: the difference is no larger than its spread."
        )
        return Finding("warn", Markup(text).format(us, them))
    if outcome == "fewer":
        return Finding("bad", Markup("{} found <em>fewer</em> of the known domains than {}.").format(us, them))
    if outcome == "unsure more":
        return Finding("info", Markup("{} found more of the known domains than {} this time.").format(us, them))
    how = "as many of the known domains as" if outcome == "unsure alike" else "fewer of the known domains than"
    return Finding("warn", Markup("{} did <em>not</em> find more: it found {} {}.").format(us, how, them))


def _never_found(explored: Exploration) -> list[Finding]:
    missed = [d for d in explored.domains if finite(explored.domain(explored.main, d).get("found_by")) == 0]
    if not missed:
        return []
    text = Markup("{} never found {}.").format(label(explored.main), names(missed))
    return [Finding("warn", text)]


def _precision(explored: Exploration) -> list[Finding]:
    row = explored.methods.get(explored.main, {})
    precision, sd = finite(row.get("precision")), finite(row.get("precision_sd"))
    if precision is None:
        return []
    share = percent(precision) if sd is None else f"{plain(100 * precision, 0)}\u00a0\u00b1\u00a0{plain(100 * sd, 0)}%"
    text = Markup("{} of its texts belong to a known new domain.").format(share)
    return [Finding("info", text)]
