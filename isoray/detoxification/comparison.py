"""Text sets held against texts drawn from the base model alone: whether they do what UniDetox rests on.

The distilled texts should be likelier under the base than under the toxic model, and pull the base's weights away from
toxicity, both more so than the base's own texts (Lu et al., 2025, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isoray.detoxification.config import DistilConfig
from isoray.detoxification.direction import Direction
from isoray.detoxification.texts import ContrastJudge, TextSet, draw, give, plain_of, rows_of, sound_rows
from isoray.evaluation.words import word_shift
from isoray.models.load import weights_digest
from isoray.workshop import Workshop

PLAIN = "plain"
"""What the base's own texts are called in results."""
WORDS = 30
"""Words listed of each set."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """What was found, for results; empty where nothing was compared."""

    values: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """By set, `plain` among them: ``log_ratio`` (mean over its texts of each text's mean per token, nats), ``cosine``
    (of its gradient step with the negated toxic vector), ``scored`` (how many texts have a log-ratio)."""
    words: Rows = field(default_factory=list)
    """Words in which a set differs from the base's own texts."""

    @property
    def metrics(self) -> dict[str, float]:
        """``log_ratio/<set>`` and ``cosine/<set>``."""
        return {
            f"{name}/{method}": value
            for method, values in self.values.items()
            for name in ("log_ratio", "cosine")
            if (value := values[name]) is not None
        }


def compare(
    shop: Workshop, distil: DistilConfig, judge: ContrastJudge, sets: Mapping[str, TextSet], *, length: int
) -> Comparison:
    """Hold up to ``distil.compared`` texts of each set, and of all sets those that are scored, against the base's own.

    ``length``: tokens of a text that gradients are taken of.
    """
    count = distil.compared
    generation = plain_of(distil, judge, shop.seed)
    folder = draw(shop, PLAIN, generation, prompt=distil.prompt, count=count, judge=judge)
    rows: dict[str, Rows] = {PLAIN: list(sound_rows(rows_of(folder, judge)))}
    for method, one in sets.items():
        rows[method] = _scored(shop, method, [row for row in one.read().to_pylist() if row["learnt"]], judge, count)
    texts = {method: [row["text"] for row in sound_rows(held)][:count] for method, held in rows.items()}
    cosines = _cosines(shop, judge, texts, length)
    values = {}
    for method, held in rows.items():
        ratios = [row["log_ratio"] for row in held if row.get("log_ratio") is not None]
        mean = sum(ratios) / len(ratios) if ratios else None
        values[method] = {"log_ratio": mean, "cosine": cosines[method], "scored": len(ratios)}
    plain = [row["text"] for row in rows[PLAIN]]
    words = [
        {"texts": method, **row}
        for method, one in sets.items()
        for row in word_shift(one.learnt_texts(), plain, top=WORDS)
    ]
    return Comparison(values, words)


def _scored(shop: Workshop, method: str, rows: Rows, judge: ContrastJudge, count: int) -> Rows:
    """``rows`` if they have log-ratios; else, as those of given texts, the first ``count`` with theirs."""
    if all(row.get("log_ratio") is not None for row in rows[:count]):
        return rows
    sample = [row["text"] for row in rows[:count]]
    return rows_of(give(shop, f"scored-{method}", sample, judge=judge), judge)


def _cosines(shop: Workshop, judge: ContrastJudge, texts: Mapping[str, list[str]], length: int) -> dict[str, float]:
    base, toxic = Path(judge.contrast.positive), Path(str(judge.contrast.negative))

    def work(_: Path) -> list[float]:
        direction = Direction(base, toxic, list(texts.values()), length, shop.engines().cpus)
        found = dict(shop.carry_out(direction, len(texts), phase="directions"))
        return [float(found[item]) for item in range(len(texts))]

    inputs = [weights_digest(base), weights_digest(toxic), length, texts]
    return dict(zip(texts, shop.run.step("directions", inputs, work), strict=True))
