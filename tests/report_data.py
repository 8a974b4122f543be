"""A made-up but realistic results.json of the recipe untrac, for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CORPORA = ["wikipedia", "pile_cc", "cc_news", "openwebtext2", "stories", "bookcorpus", "gutenberg", "hackernews"]
TESTS = [
    "toxigen/asian",
    "toxigen/women",
    "toxigen/black",
    "winobias/pro_male",
    "winobias/anti_female",
    "truthfulqa/health",
]
NOISE = {
    "untrac": 0.45,
    "untrac_inv": 0.6,
    "grad_dot": 2.5,
    "grad_cos": 1.1,
    "tracin": 1.4,
    "hif_lissa": 3.0,
    "hif_arnoldi": 1.2,
}
"""Standard deviation of each estimator's error, in standard deviations of the truth."""


def standardise(values: Sequence[float]) -> list[float]:
    centre = sum(values) / len(values)
    spread = math.sqrt(sum((v - centre) ** 2 for v in values) / len(values))
    return [(v - centre) / spread for v in values]


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(standardise(xs), standardise(ys), strict=True)) / len(xs)


def ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [float(order.index(v)) for v in values]


def results(
    *,
    corpora: Sequence[str] = CORPORA,
    tests: Sequence[str] = TESTS,
    seeds: int = 3,
    noise: dict[str, float] | None = None,
    truth: bool = True,
    steps: int = 20,
) -> dict[str, Any]:
    """A whole ``results.json``; the corpora help in the order given, up to a test set's own taste."""
    rng = random.Random(7)
    noise = NOISE if noise is None else noise
    influence: list[dict[str, Any]] = []
    agreement: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for test in tests:
        real = [0.4 * (len(corpora) / 2 - i) + rng.gauss(0, 0.6) for i in range(len(corpora))]
        if truth:
            influence += _rows("truth", None, test, corpora, [0.02 * v for v in real])
        for estimator, error in noise.items():
            bias = [rng.gauss(0, error) for _ in corpora]
            for seed in range(seeds):
                scores = [r + b + rng.gauss(0, 0.2 * error) for r, b in zip(real, bias, strict=True)]
                influence += _rows(estimator, seed, test, corpora, scores)
                if truth and len(corpora) > 1:
                    agreement.append(
                        {
                            "estimator": estimator,
                            "seed": seed,
                            "test": test,
                            "pearson": correlation(real, scores),
                            "spearman": correlation(ranks(real), ranks(scores)),
                        }
                    )
                if estimator.startswith("untrac"):
                    curves += _curves(estimator, seed, test, corpora, scores, steps)
    tables = {
        "influence": influence,
        "agreement": agreement,
        "agreement_summary": _summary(agreement, list(noise), seeds, len(tests)),
        "curves": curves,
        "training": _training(corpora if truth else [], rng),
        "corpora": _corpora(corpora, tests, rng),
        "phases": [
            {
                "phase": "read and pack",
                "jobs": 8,
                "seconds": 41.2,
                "worker_seconds": 80.1,
                "peak_memory_mb": 812.4,
                "reused": True,
            },
            {
                "phase": "train",
                "jobs": 1,
                "seconds": 412.9,
                "worker_seconds": 412.9,
                "peak_memory_mb": 1420.0,
                "reused": False,
            },
            {
                "phase": "leave-one-out",
                "jobs": 8,
                "seconds": 1733.0,
                "worker_seconds": 3377.1,
                "peak_memory_mb": 1431.5,
                "reused": False,
            },
            {
                "phase": "untrac",
                "jobs": 24,
                "seconds": 388.4,
                "worker_seconds": 770.2,
                "peak_memory_mb": 1318.0,
                "reused": False,
            },
            {
                "phase": "untrac_inv",
                "jobs": 18,
                "seconds": 66.0,
                "worker_seconds": 120.9,
                "peak_memory_mb": 1390.7,
                "reused": False,
            },
        ],
        "deviations": [{"option": "unlearning.batch_size", "value": 8, "paper": 1}],
    }
    return {
        "recipe": "untrac",
        "config_digest": "3fa9c17e2b04",
        "seed": 0,
        "started": "2024-05-17T09:12:44+00:00",
        "seconds": 2641.5,
        "metrics": {"pearson/untrac": 0.71, "pearson/grad_cos": 0.44},
        "tables": tables,
        "artifacts": {"model": "model"},
        "lineage": {},
        "environment": {"python": "3.11.7", "torch": "2.9.1", "ray": "2.50.0", "device": "cpu, 2 cores"},
    }


def write_run(folder: Path, found: dict[str, Any]) -> Path:
    """A run's folder that holds these results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found))
    config = {"recipe": "untrac", "seed": 0, "corpora": {"root": "data"}, "unlearning": {"learning_rate": 5e-5}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _rows(
    estimator: str, seed: int | None, test: str, corpora: Sequence[str], scores: list[float]
) -> list[dict[str, Any]]:
    level = standardise(scores) if len(set(scores)) > 1 else [0.0 for _ in scores]
    return [
        {"estimator": estimator, "seed": seed, "test": test, "corpus": c, "score": s, "standardised": z}
        for c, s, z in zip(corpora, scores, level, strict=True)
    ]


def _curves(
    estimator: str, seed: int, test: str, corpora: Sequence[str], scores: list[float], steps: int
) -> list[dict[str, Any]]:
    rows = []
    for corpus, score in zip(corpora, scores, strict=True):
        unlearnt, watched = (test, corpus) if estimator == "untrac_inv" else (corpus, test)
        for step in range(steps + 1):
            loss = 3.4 + 5 * math.exp(0.35 * score) * (step / steps) ** 2
            rows.append(
                {
                    "estimator": estimator,
                    "seed": seed,
                    "job": f"{unlearnt}-{seed}",
                    "corpus": unlearnt,
                    "step": 16 * step,
                    "set": watched,
                    "loss": loss,
                }
            )
    return rows


def _summary(agreement: list[dict[str, Any]], estimators: list[str], seeds: int, tests: int) -> list[dict[str, Any]]:
    rows = []
    for place, estimator in enumerate(estimators):
        mine = [row for row in agreement if row["estimator"] == estimator]
        if not mine:
            continue
        row: dict[str, Any] = {"estimator": estimator, "seeds": seeds, "tests": tests, "seconds": 388.4 / (1 + place)}
        for name in ("pearson", "spearman"):
            by_seed = [sum(r[name] for r in mine if r["seed"] == s) / tests for s in range(seeds)]
            centre = sum(by_seed) / seeds
            row[f"{name}_mean"] = centre
            row[f"{name}_sd"] = math.sqrt(sum((v - centre) ** 2 for v in by_seed) / (seeds - 1)) if seeds > 1 else None
        rows.append(row)
    return rows


def _training(left_out: Sequence[str], rng: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "step": step,
            "loss": 3.2 + 6 * math.exp(-step / 200) + rng.gauss(0, 0.1),
            "learning_rate": 5e-4,
            "grad_norm": 1 + 4 * math.exp(-step / 150) + abs(rng.gauss(0, 0.1)),
            "tokens_per_second": rng.gauss(8200, 200),
        }
        for model in ["all", *(f"without {c}" for c in left_out)]
        for step in range(0, 1000, 10)
    ]


def _corpora(corpora: Sequence[str], tests: Sequence[str], rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for role, name in [("train", c) for c in corpora] + [("test", t) for t in tests]:
        documents = rng.randrange(900, 40_000) if role == "train" else 256
        rows.append(
            {
                "corpus": name,
                "role": role,
                "documents": documents,
                "tokens": documents * rng.randrange(80, 900),
                "blocks": documents // 3,
                "license": rng.choice(["CC-BY-SA-4.0", "public domain", "MIT"]),
                "digest": f"{rng.getrandbits(256):064x}",
                "files": 1,
                "issues": {"empty": 3, "broken json": 1} if name == corpora[0] else {},
            }
        )
    return rows
