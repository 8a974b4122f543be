"""What an exploration allows one to say, in sentences: whether anything is new, what, and how sure that is.

How the methods compare is told in :mod:`isoray.report.cge.versus`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from isoray.report.cge.results import LEVEL, Exploration, Group, label, power
from isoray.report.cge.sureness import NOTHING_NEW, Sureness, ordered, percent
from isoray.report.cge.versus import against_others, found_words
from isoray.report.numbers import finite, plain, short
from isoray.report.sentences import Answer, Finding, Kind, join

SHOWN = 5
"""Findings that the first sentence names."""
DOUBTFUL = 0.8
"""Held-out accuracy below which a labeller's name for a corpus is called doubtful."""


def judge(
    explored: Exploration, trainings: Sequence[Mapping[str, Any]], labellers: Sequence[Mapping[str, Any]]
) -> Answer:
    """The verdict on a run."""
    private = [_private(row) for row in trainings if finite(row.get("epsilon")) is not None]
    if explored.is_new is None:
        text = (
            "This run did not measure how far the fine-tune is from its pre-trained model, so nothing can be said yet."
        )
        return Answer(
            Markup(text), "info", "No answer yet", Markup("Run it again; it goes on where it stopped."), private
        )
    if not explored.is_new:
        return _nothing(explored, private)
    held = ordered(explored)
    findings = [*against_others(explored), *private, *(_doubtful(labellers) if held else [])]
    return Answer(_lead(explored, held), *_overall(explored, held), findings)


def _nothing(explored: Exploration, findings: list[Finding]) -> Answer:
    if explored.identical:
        lead = Markup("Nothing new: the fine-tune has the same weights as its pre-trained model, to the last bit.")
        reason = Markup(
            "The divergence of two identical models is 0, so nothing was looked for and there are no findings."
        )
        return Answer(lead, "info", "Nothing new", reason, findings)
    limit = finite(explored.config.get("nothing_below"))
    below = Markup(", below the {} that count as nothing").format(_number(limit)) if limit is not None else Markup("")
    lead = Markup("Nothing new: on texts of its own the fine-tune is {} nats a token from its pre-trained model{}{}.")
    reason = Markup(
        "The whole interval of the divergence lies below the limit, so nothing was looked for and there are no "
        "findings. That does not exclude something that the fine-tune says too rarely to come up in {}."
    )
    drawn = finite(explored.config.get("control"))
    sample = f"the {drawn:,.0f} texts sampled from it" if drawn is not None else "the texts sampled from it"
    return Answer(lead.format(_number(explored.divergence[0]), _interval(explored), below), "info", "Nothing new",
                  reason.format(sample), findings)  # fmt: skip


def _lead(explored: Exploration, held: Sequence[tuple[Group, Sureness]]) -> Markup:
    apart = Markup("The two models are {} nats a token apart{}.").format(
        _number(explored.divergence[0]), _interval(explored)
    )
    domains = _domains(explored)
    if not held:
        return Markup("The fine-tune differs from its pre-trained model, but this run holds no findings. ") + apart
    new = [group for group, sure in held if not sure.nothing]
    idle = len(held) - len(new)
    if not new:
        only = "The only finding is" if idle == 1 else f"All {idle} findings are"
        return Markup("{} probably nothing new. ").format(only) + apart + domains
    seems = "has" if all(sure.kind != "warn" for _, sure in held if not sure.nothing) else "seems to have"
    count = "One finding" if len(new) == 1 else f"{len(new)} findings"
    rest = Markup("")
    if idle:
        rest = Markup(" {} probably nothing new.").format("One more is" if idle == 1 else f"{idle} more are")
    first = Markup("{}: the fine-tune {} newly learnt {}.{} ").format(count, seems, _named(new), rest)
    return first + apart + domains


def _named(groups: Sequence[Group]) -> Markup:
    """``code (50% of the texts) and german (33%)``; findings of one name are told apart by their words."""
    called = Counter(group.name for group in groups)
    shown = []
    for place, group in enumerate(groups[:SHOWN]):
        same = called[group.name] > 1 and group.told_words not in ("", group.name)
        words = Markup(" <bdi>{}</bdi>").format(group.told_words) if same else Markup("")
        share = f"{percent(group.share)} of the texts" if place == 0 else percent(group.share)
        shown.append(Markup("<b><bdi>{}</bdi></b>{} ({})").format(group.name, words, share))
    more = len(groups) - len(shown)
    return join(shown + ([Markup("{} more").format(more)] if more else []))


def _domains(explored: Exploration) -> Markup:
    if not explored.domains or explored.found(explored.main)[0] is None:
        return Markup("")
    return Markup(" {} found {} of the {} new domains that are known.").format(
        label(explored.main), found_words(explored, explored.main), len(explored.domains)
    )


def _overall(explored: Exploration, held: Sequence[tuple[Group, Sureness]]) -> tuple[Kind, str, Markup]:
    """Tone, level and reason of the answer."""
    levels = [sure.level for _, sure in held]
    told = [
        Markup("{} {} {}").format(count, "is" if count == 1 else "are", level.lower())
        for level, count in Counter(levels).items()
    ]
    counted = Markup("Of the findings, {}. ").format(join(told)) if len(held) > 1 else Markup("")
    alone = "Only one exploration was made, so it is not known whether another would find the same."
    again = Markup(alone) if explored.made < 2 else Markup("{} explorations were made.").format(explored.made)
    reason = counted + again
    limit, low = finite(explored.config.get("nothing_below")) or 0.0, explored.divergence[1]
    if low is None or low < limit:
        text = "The interval of the divergence does not exclude that the models are alike on ordinary texts. "
        return "warn", "Perhaps something is new", Markup(text) + reason
    if not held or all(level == NOTHING_NEW for level in levels):
        return "warn", "Different, but nothing found", reason
    return "good", "Something is new", reason


def _private(row: Mapping[str, Any]) -> Finding:
    text = Markup(
        "The training \u201c{}\u201d was differentially private: \u03b5 = {}{}. That bounds what it can have learnt "
        "from any single example, so expect less to be found."
    )
    delta = finite(row.get("delta"))
    told = f", \u03b4 = {power(delta)}" if delta is not None else ", \u03b4 not told"
    return Finding("info", text.format(row.get("name"), short(finite(row.get("epsilon"))), told))


def _doubtful(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    weak = [(row, known) for row in rows if (known := finite(row.get("accuracy"))) is not None and known < DOUBTFUL]
    if not weak:
        return []
    told = [Markup("<b>{}</b> ({}, {})").format(row.get("corpus"), row.get("labeller"), percent(a)) for row, a in weak]
    text = Markup("Labels to be doubted, by how often the labeller was right on held-out passages: {}.")
    return [Finding("warn", text.format(join(told)))]


def _number(value: float | None) -> str:
    return "an unknown number of" if value is None else power(value) if abs(value) < 0.1 else plain(value, 2)


def _interval(explored: Exploration) -> Markup:
    _, low, high = explored.divergence
    if low is None or high is None:
        return Markup(" (without an interval)")
    return Markup(" ({} interval {} to {})").format(LEVEL, _number(low), _number(high))
