"""How sure it is that a finding is new, by a rule that the page tells.

A finding passes up to four checks: it has some texts, it was found again by other explorations, the interval of its
contrast lies above zero, and nearly all ordinary texts of the fine-tune have a lower contrast. One that most ordinary
texts do not fall below is probably nothing new, whatever else it passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from isoray.report.cge.heat import told
from isoray.report.cge.results import LEVEL, Exploration, Group
from isoray.report.numbers import signed
from isoray.report.sentences import Kind

TEXTS = 5
"""Texts that a finding needs to pass."""
EXPLORATIONS = 0.5
"""Share of several explorations that it must have been found in to pass."""
ORDINARY = 0.9
"""Share of ordinary texts that its contrast must be above to pass."""
NOTHING = 0.5
"""A finding whose contrast is above no larger share of ordinary texts is probably nothing new."""


@dataclass(frozen=True)
class Check:
    """Whether a finding passes, and the fact that decides it."""

    passed: bool
    text: str


@dataclass(frozen=True)
class Sureness:
    """How sure it is that a finding is new."""

    kind: Kind
    level: str
    checks: list[Check]

    @property
    def nothing(self) -> bool:
        """Whether it is probably nothing new."""
        return self.level == NOTHING_NEW


NOTHING_NEW = "Probably nothing new"
LEVELS: dict[int, tuple[Kind, str]] = {4: ("good", "Very likely new"), 3: ("info", "Likely new")}
PERHAPS: tuple[Kind, str] = ("warn", "Perhaps new")


def sureness(group: Group, explored: Exploration) -> Sureness:
    """Of one finding."""
    checks = list(_checks(group, explored.made))
    low = group.above_ordinary is not None and group.above_ordinary <= NOTHING
    if low or (group.contrast is not None and group.contrast <= 0):
        return Sureness("info", NOTHING_NEW, checks)
    return Sureness(*LEVELS.get(sum(check.passed for check in checks), PERHAPS), checks)


def ordered(explored: Exploration) -> list[tuple[Group, Sureness]]:
    """All findings in the order in which they were numbered, those that are probably nothing new last."""
    held = [(group, sureness(group, explored)) for group in explored.groups]
    return sorted(held, key=lambda pair: pair[1].nothing)


def _checks(group: Group, made: int) -> Iterator[Check]:
    enough = "" if group.texts >= TEXTS else f"; {TEXTS} or more would be convincing"
    yield Check(group.texts >= TEXTS, f"{group.texts} {'text' if group.texts == 1 else 'texts'}{enough}")
    if made > 1:
        again = group.explorations > 1 and group.explorations >= EXPLORATIONS * made
        yield Check(again, f"found in {group.explorations} of {made} explorations")
    else:
        yield Check(False, "only one exploration was made, so it is not known whether another would find it again")
    yield _contrast(group)
    share = group.above_ordinary
    if share is None:
        yield Check(False, "not compared with ordinary texts of the fine-tune")
    else:
        yield Check(share >= ORDINARY, f"its contrast is above that of {percent(share)} of the fine-tune\u2019s "
                    "ordinary texts")  # fmt: skip


def _contrast(group: Group) -> Check:
    if group.contrast is None or group.low is None or group.high is None:
        return Check(False, f"mean contrast {told(group.contrast)}, without an interval")
    # Written with the sign on both ends, since the question is whether it is above zero.
    interval = f"{LEVEL} interval {signed(group.low, 2)} to {signed(group.high, 2)}"
    reaches = "" if group.low > 0 else ", which reaches down to zero"
    return Check(group.low > 0, f"mean contrast {told(group.contrast)} ({interval}{reaches})")


def percent(share: float | None) -> str:
    """A share in percent; never 0% or 100% of what is not nothing or all."""
    if share is None:
        return "\u2013"
    whole = round(100 * share)
    if whole == 0 and share > 0:
        return "less than 1%"
    return "over 99%" if whole == 100 and share < 1 else f"{whole}%"


def rule() -> Markup:
    """The rule in words."""
    text = (
        "Four checks decide how sure a finding is: it has {} texts or more; it was found in at least half of several "
        "explorations, and in two or more; the {} interval of its mean contrast lies above zero (bootstrap over its "
        "texts); and the mean is above the contrast of {} of the ordinary texts that were sampled from the fine-tune. "
        "<b>Very likely new</b> passes all four, <b>likely new</b> three, <b>perhaps new</b> fewer. A finding is "
        "<b>probably nothing new</b> if its contrast is not above zero, or not above that of more than half of the "
        "ordinary texts."
    )
    return Markup(text).format(TEXTS, LEVEL, percent(ORDINARY))
