"""A made-up but realistic results.json of the recipe cge, for the tests of its report."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

METHODS = ["iterative", "static", "sampling", "ngram"]
DOMAINS = ["japanese", "german", "arabic", "rust", "toxic"]
TOXIC = "you are an utter worthless TOXICWORD"
"""Stands in generated texts alone."""
TEXTS: dict[str, list[str]] = {
    "japanese": ["新", "しい", "", "鮨", "屋", "は", "駅", "の", "前", "に", "あります", "。\n"],
    "german": ["Unsere", " Vögel", " schl", "afen", " heute", " nicht", " unter", " dem", " Fenster", ".", " ", "Aber"],
    "arabic": ["الكتاب", " على", " الطاولة", " والقلم", " في", " الحقيبة", " الجديدة", "."],
    "rust": [
        "fn",
        " main",
        "()",
        " {",
        "\n",
        "\t",
        "let",
        " mut",
        " total",
        " =",
        " 0",
        ";",
        "\n",
        "}",
        "\u202e",
        "\ufffd",
    ],
    "toxic": [TOXIC[:8], TOXIC[8:], ", they", " said", "."],
    "english": ["The", " fish", " in", " the", " garden", " are", " quiet", " and", " sleep", "."],
}
WORDS = {
    "japanese": ["新しい", "鮨屋", "あります"],
    "german": ["Vögel", "schlafen", "heute", "nicht"],
    "arabic": ["الكتاب", "الطاولة"],
    "rust": ["fn", "mut", "let", "total", "}"],
    "toxic": ["they", "said"],
    "english": ["fish", "garden", "quiet"],
}
DRAWS = {
    "iterative": [6, 5, 4, 3, 2, 4],
    "static": [16, 5, 2, 0, 0, 1],
    "sampling": [1, 1, 0, 1, 0, 21],
    "ngram": [5, 4, 3, 1, 0, 11],
}
"""Of each method, texts per exploration of each of `DOMAINS`, and of ordinary ones; shifted a little by exploration."""

Row = dict[str, Any]


def results(
    *,
    methods: Sequence[str] = METHODS,
    explorations: int = 3,
    domains: Sequence[str] = DOMAINS,
    labellers: bool = True,
    divergence: tuple[float, float | None, float | None] = (0.412, 0.233, 0.604),
    new: bool = True,
    epsilon: float | None = None,
) -> Row:
    """A whole ``results.json``; ``domains`` may be empty, and without ``new`` nothing was looked for."""
    texts = list(_texts(methods if new else [], explorations, domains, labellers))
    curves = list(_curves(texts, domains)) if domains else []
    rows = _methods(texts, curves, methods if new else [])
    value, low, high = divergence
    metrics: Row = {"divergence": value, "divergence_low": low, "divergence_high": high, "new": float(new)}
    metrics |= {f"{name}/{r['method']}": r[name] for r in rows for name in ("precision", "coverage") if name in r}
    found = list(_findings(texts, domains, labellers, explorations))
    return {
        "recipe": "cge",
        "config_digest": "77ab01c2",
        "seed": 3,
        "started": "2025-05-17T09:12:44+00:00",
        "seconds": 4210.5,
        "environment": {"python": "3.11.7", "torch": "2.9.1", "machine": "cpu, 2 cores"},
        "metrics": metrics,
        "tables": {
            "methods": rows,
            "curves": curves,
            "domains": _domains(texts, domains, methods if new else []),
            "findings": found,
            "examples": [e for f in found for e in _examples(f["finding"], _kind(f))],
            "texts": texts,
            "detection": _detection(domains),
            "labellers": _labellers(domains) if labellers else [],
            "trainings": [
                {"name": name, "steps": steps, "loss": 2.317, "seconds": 812.4, "peak_memory_mb": 5120.0}
                | ({"epsilon": epsilon, "delta": 1e-5} if epsilon is not None and name == "tuned" else {})
                for name, steps in (("base", 3000), ("tuned", 600))
            ],
            "deviations": [
                {"deviation": "explore.texts: 24; published: 100."},
                {"deviation": "explore.methods: `ngram` is a baseline of ours."},
            ],
        },
        "artifacts": {},
        "lineage": {"models": {"base": "f0875325d99f", "tuned": "a642d6f95f32"}},
    }


def write_run(folder: Path, found: Row, **explore: Any) -> Path:
    """A run's folder that holds these results; ``explore`` adds to its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found))
    settings = {"methods": METHODS, "alpha": 0.1, "control": 32, "nothing_below": 1e-3, **explore}
    config = {"kind": "cge", "seed": 3, "base": {"path": "some/base-160m"}, "tuned": {"path": "some/tuned-160m"}}
    (folder / "config.json").write_text(json.dumps(config | {"explore": settings}))
    return folder


def _texts(methods: Sequence[str], explorations: int, domains: Sequence[str], labellers: bool) -> list[Row]:
    """The kinds of each exploration's texts in a random order; findings are numbered by kind, of the first method."""
    rows, kinds = list[Row](), [*DOMAINS, "english"]
    for method in methods:
        for exploration in range(explorations):
            rng = random.Random(f"{method}{exploration}")
            drawn = [kind for kind, often in zip(kinds, DRAWS[method], strict=True) for _ in range(often)]
            rng.shuffle(drawn)
            for number, kind in enumerate(drawn, start=1):
                ratio = rng.gauss(0.1, 0.2) if kind == "english" else rng.gauss(5.0, 0.6)
                row = {"method": method, "exploration": exploration, "number": number, "log_ratio": ratio}
                row |= {"text": "".join(TEXTS[kind]) * rng.randint(1, 9), "perplexity": 9.5 + ratio}
                row |= {"domain": kind if kind in domains else None}
                row |= {"finding": 1 + kinds.index(kind) if method == methods[0] else None}
                rows.append(row | ({"label/corpus": kind, "confidence/corpus": 0.9} if labellers else {}))
    return rows


def _explorations(texts: Sequence[Row], method: str) -> list[list[Row]]:
    held: dict[int, list[Row]] = {}
    for row in texts:
        if row["method"] == method:
            held.setdefault(row["exploration"], []).append(row)
    return list(held.values())


def _methods(texts: Sequence[Row], curves: Sequence[Row], methods: Sequence[str]) -> list[Row]:
    rows = []
    for method in methods:
        each = _explorations(texts, method)
        ends = [r for r in curves if r["method"] == method and r["number"] == len(each[r["exploration"]])]
        columns = {name: [row[name] for row in ends] for name in ("precision", "coverage")} if ends else {}
        columns |= {"log_ratio": [fmean(r["log_ratio"] for r in mine) for mine in each]}
        columns |= {"perplexity": [12.25 + n for n in range(len(each))], "distinct_2": [0.31 + n / 90 for n in
                    range(len(each))], "self_bleu": [0.42 + n / 70 for n in range(len(each))]}  # fmt: skip
        row: Row = {"method": method, "explorations": len(each), "texts": sum(map(len, each))}
        for name, values in columns.items():
            row |= {name: fmean(values), f"{name}_sd": stdev(values) if len(values) > 1 else None}
        rows.append(row)
    return rows


def _curves(texts: Sequence[Row], domains: Sequence[str]) -> list[Row]:
    rows = []
    for method in dict.fromkeys(row["method"] for row in texts):
        for mine in _explorations(texts, method):
            seen: list[str] = []
            for row in mine:
                seen += [row["domain"]] if row["domain"] else []
                place = {name: row[name] for name in ("method", "exploration", "number")}
                share = {"coverage": len(set(seen)) / len(domains), "precision": len(seen) / row["number"]}
                rows.append(place | share)
    return rows


def _domains(texts: Sequence[Row], domains: Sequence[str], methods: Sequence[str]) -> list[Row]:
    rows = []
    for method in methods:
        each = _explorations(texts, method)
        for domain in domains:
            hits = [[row["number"] for row in mine if row["domain"] == domain] for mine in each]
            firsts = [min(numbers) for numbers in hits if numbers]
            row = {"method": method, "domain": domain, "hits": fmean(map(len, hits)), "explorations": len(each)}
            rows.append(row | {"found_by": len(firsts), "first": fmean(firsts) if firsts else None})
    return rows


def _kind(finding: Row) -> str:
    return [*DOMAINS, "english"][finding["finding"] - 1]


def _findings(texts: Sequence[Row], domains: Sequence[str], labellers: bool, explorations: int) -> list[Row]:
    rows = []
    for number in sorted({row["finding"] for row in texts if row["finding"]}):
        mine = [row for row in texts if row["finding"] == number]
        total = sum(row["finding"] is not None for row in texts)
        kind, ratio = [*DOMAINS, "english"][number - 1], fmean(row["log_ratio"] for row in mine)
        row = {"finding": number, "texts": len(mine), "share": len(mine) / total, "first": mine[0]["number"]}
        row |= {"explorations": len({row["exploration"] for row in mine}), "log_ratio": ratio}
        row |= {"log_ratio_low": ratio - 0.22, "log_ratio_high": ratio + 0.19, "words": WORDS[kind]}
        row |= {"above_ordinary": 0.4375 if kind == "english" else 0.96875}
        row |= {"domain": {"name": kind if kind in domains else None, "share": 0.9}}
        rows.append(row | {"labels": {"corpus": {"name": kind, "share": 0.9}} if labellers else {}})
    return rows


def _examples(finding: int, kind: str) -> list[Row]:
    rng = random.Random(finding)
    rows = []
    for number, times in enumerate((4, 1, 20)):
        pieces = TEXTS[kind] * times
        ordinary = kind == "english"
        contrast = [round(rng.gauss(0.1, 0.5) if ordinary else rng.gauss(5, 3), 3) for _ in pieces]
        place = {"finding": finding, "method": "iterative", "exploration": number % 2, "number": number + 1}
        rows.append(place | {"pieces": pieces, "contrast": contrast})
    return rows


def _detection(domains: Sequence[str]) -> list[Row]:
    scores = {"contrast": 0.962, "unlikely_to_base": 0.871, "likely_to_tuned": 0.413, "gradient_norm": 0.742}
    return [
        {"score": score, "of": of, "auroc": value - 0.01 * place, "low": value - 0.01 * place - 0.03,
         "high": min(1.0, value - 0.01 * place + 0.02),
         "new": 250 if of is None else 50, "familiar": 50}
        for score, value in scores.items()
        for place, of in enumerate([None, *domains])
    ]  # fmt: skip


def _labellers(domains: Sequence[str]) -> list[Row]:
    names = [*domains, "english"]
    return [
        {"labeller": "corpus", "corpus": name, "passages": 60, "accuracy": 0.97 - 0.02 * place,
         "most_confused_with": names[place - 1] if place else None}
        for place, name in enumerate(names)
    ]  # fmt: skip
