"""The tables of an exploration's report: cells as HTML, with exact numbers on hover."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from isoray.report.cge.heat import clipped, example, told
from isoray.report.cge.results import Exploration, Group, Named, label
from isoray.report.cge.sureness import Sureness, percent
from isoray.report.numbers import NOTHING, finite, num, plain, plus_minus

MOST = 200
"""Texts that the table of all texts shows."""
COLUMNS = (
    ("precision", "Precision", 2),
    ("coverage", "Coverage", 2),
    ("log_ratio", "Contrast", 2),
    ("perplexity", "Perplexity", 2),
    ("distinct_2", "Distinct-2", 3),
    ("self_bleu", "Self-BLEU", 3),
)
"""Name, title and digits of the columns of the table of methods."""


def card(group: Group, sure: Sureness, explored: Exploration, reach: float) -> dict[str, Any]:
    """A finding as its card shows it."""
    main = explored.methods.get(explored.main, {})
    total = finite(main.get("texts"))
    of = f"{group.texts} of {total:,.0f}" if total is not None else f"{group.texts}"
    return {
        "number": group.number,
        "name": group.name,
        "kind": sure.kind,
        "level": sure.level,
        "nothing": sure.nothing,
        "checks": sure.checks,
        "share": group.share,
        "share_told": f"{percent(group.share)} of the texts ({of})",
        "first": group.first,
        "words": group.words,
        "domain": _share_told(group.domain) if explored.domains else None,
        "labels": [(by, _share_told(named)) for by, named in group.labels.items()],
        "examples": [example(row, reach) for row in group.examples],
    }


def _share_told(named: Named) -> str:
    return f"{'none' if named.name is None else named.name} ({percent(named.share)})"


def method_table(explored: Exploration) -> dict[str, Any]:
    """A row for each method: means over its explorations with their standard deviations."""
    rows = explored.methods
    columns = [c for c in COLUMNS if any(finite(row.get(c[0])) is not None for row in rows.values())]
    told_rows = [
        {
            "name": label(method),
            "ours": method == explored.main,
            "explorations": row.get("explorations"),
            "texts": row.get("texts"),
            "cells": [plus_minus(row.get(name), row.get(f"{name}_sd"), digits) for name, _, digits in columns],
        }
        for method, row in rows.items()
    ]
    return {"columns": [title for _, title, _ in columns], "rows": told_rows}


def domain_table(explored: Exploration) -> dict[str, Any]:
    """A row for each known domain: what each method found of it."""
    methods = [m for m in explored.methods if any(str(row["method"]) == m for row in explored.domain_rows)]
    rows = [
        {"name": domain, "cells": [_domain_cell(explored.domain(m, domain)) for m in methods]}
        for domain in explored.domains
    ]
    return {"methods": [label(m) for m in methods], "rows": rows}


def _domain_cell(row: Mapping[str, Any]) -> Markup:
    found_by, made = finite(row.get("found_by")), finite(row.get("explorations"))
    hits = finite(row.get("hits"))
    if hits is None and found_by is None:
        return NOTHING
    if found_by == 0:
        return Markup('<span class="muted">not found</span>')
    first = finite(row.get("first"))
    after = (
        Markup(", first text {}").format(plain(first, 0 if first == round(first) else 1))
        if first is not None
        else Markup("")
    )
    found = Markup("found by {:g} of {:g}").format(found_by or 0, made) if made is not None else Markup("found")
    shown = num(hits, 0) if hits is not None and hits == round(hits) else num(hits, 1)
    return shown + Markup('<small class="ci">{}{}</small>').format(found, after)


def text_table(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first texts of each method, as many of each, and how many there are."""
    kept = [row for row in rows if isinstance(row.get("text"), str)]
    if not kept:
        return None
    methods = list(dict.fromkeys(str(row.get("method")) for row in kept))
    each = MOST // len(methods) if len(kept) > MOST else MOST
    labellers = list(dict.fromkeys(key for row in kept for key in row if key.startswith("label/")))
    domains = any(isinstance(row.get("domain"), str) for row in kept)
    shown = [row for method in methods for row in [r for r in kept if str(r.get("method")) == method][:each]]
    return {
        "labellers": [key.removeprefix("label/") for key in labellers],
        "domains": domains,
        "rows": [_text_row(row, labellers) for row in shown],
        "total": len(kept),
        "each": each,
    }


def _text_row(row: Mapping[str, Any], labellers: Sequence[str]) -> dict[str, Any]:
    exploration = finite(row.get("exploration"))
    return {
        "method": label(str(row.get("method"))),
        "exploration": None if exploration is None else int(exploration) + 1,
        "number": row.get("number"),
        "finding": finite(row.get("finding")),
        "domain": name if isinstance(name := row.get("domain"), str) else None,
        "labels": [name if isinstance(name := row.get(key), str) else None for key in labellers],
        "contrast": contrast_html(row.get("log_ratio")),
        **clipped(str(row["text"])),
    }


def contrast_html(value: object) -> Markup:
    """A contrast with its sign, exact on hover."""
    known = finite(value)
    shown = told(known).removesuffix(" nats a token")
    return NOTHING if known is None else Markup('<span title="{}">{}</span>').format(repr(value), shown)


def training_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each training with its share of the longest one's time."""
    seconds = [finite(row.get("seconds")) or 0.0 for row in rows]
    names = ("name", "steps", "loss", "seconds", "peak_memory_mb", "epsilon", "delta")
    return [
        {**{name: row.get(name) for name in names}, "share": 100 * own / max(*seconds, 1e-9)}
        for row, own in zip(rows, seconds, strict=True)
    ]
