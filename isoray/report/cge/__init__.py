"""The sections of an exploration's report: what a fine-tune has newly learnt, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from isoray.report.cge import detection, tables
from isoray.report.cge.curves import curve_panel
from isoray.report.cge.heat import reach, scale
from isoray.report.cge.results import LEVEL, Exploration, mapping, power
from isoray.report.cge.sureness import ordered, rule
from isoray.report.cge.verdict import judge
from isoray.report.cge.versus import found_words
from isoray.report.numbers import duration, finite, plain, short
from isoray.report.page import Content, RunFiles, Section, render


def content(run: RunFiles) -> Content:
    """Question, facts and sections, in the order in which a reader needs them."""
    explored = Exploration(run)
    made = [
        _answer(run, explored),
        _findings(explored),
        _methods(explored),
        _detection(run),
        _trainings(run),
        _labellers(run),
        _how(run, explored),
        _texts(run, explored),
    ]
    return Content(
        "What is new in this fine-tune?", _about(run), _facts(run, explored), [one for one in made if one is not None]
    )


def _about(run: RunFiles) -> Markup:
    config = run.config or {}
    tuned, base = (_model_name(config.get(name)) for name in ("tuned", "base"))
    if config.get("fine_tuning") is not None:
        tuned = "a fine-tune that this run made"
    if not tuned or not base:
        return Markup("What its texts have that those of its pre-trained model have not.")
    return Markup("<b>{}</b>, compared with its pre-trained model <b>{}</b>.").format(tuned, base)


def _model_name(config: object) -> str:
    held = mapping(config)
    path = held.get("path")
    if isinstance(path, str) and path:
        return PurePath(path).name
    return "made by this run" if held.get("create") is not None else ""


def _facts(run: RunFiles, explored: Exploration) -> list[tuple[str, Markup | str]]:
    facts: list[tuple[str, Markup | str]] = []
    held = ordered(explored)
    if explored.is_new is not None:
        new = sum(not sure.nothing for _, sure in held)
        facts.append(("new finding" if new == 1 else "new findings", str(new)))
    if (divergence := explored.divergence[0]) is not None:
        facts.append(("nats a token apart", plain(divergence, 2) if divergence >= 0.1 else power(divergence)))
    row = explored.methods.get(explored.main, {})
    if explored.is_new and (texts := finite(row.get("texts"))) is not None:
        facts.append(("texts drawn", f"{texts:,.0f}"))
        facts.append(("exploration" if explored.made == 1 else "explorations", str(explored.made)))
    if explored.is_new and explored.domains and explored.found(explored.main)[0] is not None:
        facts.append((f"of {len(explored.domains)} known domains", found_words(explored, explored.main)))
    for training in run.table("trainings"):
        if (epsilon := finite(training.get("epsilon"))) is not None:
            delta = finite(training.get("delta"))
            at = f", \u03b4 = {power(delta)}" if delta is not None else ""
            facts.append((f"privacy of \u201c{training.get('name')}\u201d", f"\u03b5 = {short(epsilon)}{at}"))
    if finite(run.results.get("seconds")) is not None:
        facts.append(("run time", duration(run.results["seconds"])))
    return facts


def _answer(run: RunFiles, explored: Exploration) -> Section:
    verdict = judge(explored, run.table("trainings"), run.table("labellers"))
    body = render("cge/answer.html.j2", verdict=verdict, level=LEVEL, many=len(explored.methods) > 1)
    return Section("answer", "The answer", body)


def _findings(explored: Exploration) -> Section | None:
    held = ordered(explored)
    if not held:
        return None
    far = reach(
        [row["contrast"] for group, _ in held for row in group.examples if isinstance(row.get("contrast"), list)]
    )
    cards = [tables.card(group, sure, explored, far) for group, sure in held]
    body = render(
        "cge/findings.html.j2",
        cards=cards,
        scale=scale(far),
        shown=any(card["examples"] for card in cards),
        rule=rule(),
    )
    return Section("findings", "What was found", body)


def _methods(explored: Exploration) -> Section | None:
    if not explored.methods or not explored.is_new:
        return None
    body = render(
        "cge/methods.html.j2",
        curves=curve_panel(explored),
        methods=tables.method_table(explored),
        domains=tables.domain_table(explored) if explored.domains else None,
        known=len(explored.domains),
        several=explored.made > 1,
    )
    return Section("methods", "Against the known domains" if explored.domains else "The methods, compared", body)


def _detection(run: RunFiles) -> Section | None:
    rows = run.table("detection")
    if not rows:
        return None
    body = render(
        "cge/detection.html.j2",
        findings=detection.findings(rows),
        panels=detection.panels(rows),
        table=detection.table(rows),
        level=LEVEL,
    )
    return Section("detection", "Ranking given examples", body)


def _trainings(run: RunFiles) -> Section | None:
    rows = [row for row in run.table("trainings") if row.get("name") is not None]
    if not rows:
        return None
    total = sum(finite(row.get("seconds")) or 0.0 for row in rows)
    private = any(finite(row.get("epsilon")) is not None for row in rows)
    body = render("cge/trainings.html.j2", rows=tables.training_rows(rows), total=total, private=private, power=power)
    return Section("trainings", "What was trained", body)


def _labellers(run: RunFiles) -> Section | None:
    rows = run.table("labellers")
    if not rows:
        return None
    names = ("labeller", "corpus", "passages", "accuracy", "most_confused_with")
    filled = [{name: row.get(name) for name in names} for row in rows]
    return Section("labellers", "How far labels can be trusted", render("cge/labellers.html.j2", rows=filled))


def _how(run: RunFiles, explored: Exploration) -> Section:
    deviations = [str(row["deviation"]).partition(": ") for row in run.table("deviations") if row.get("deviation")]
    told: Mapping[str, Any] = {
        name: finite(explored.config.get(name)) for name in ("alpha", "control", "nothing_below")
    }
    body = render(
        "cge/how.html.j2",
        deviations=[(name, text) if text else ("", name) for name, _, text in deviations],
        told={name: None if value is None else f"{value:g}" for name, value in told.items()},
        level=LEVEL,
    )
    return Section("how", "How it works", body)


def _texts(run: RunFiles, explored: Exploration) -> Section | None:
    table = tables.text_table(run.table("texts")) if explored.is_new is not False else None
    if table is None:
        return None
    return Section("texts", "All texts", render("cge/texts.html.j2", table=table))
