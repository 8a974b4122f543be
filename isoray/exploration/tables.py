"""The tables of an exploration: how much of what is new each method found, and how different its texts are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isoray.evaluation import novelty
from isoray.exploration.config import ExploreConfig, JudgeConfig
from isoray.exploration.explore import Found
from isoray.exploration.labels import Labelled
from isoray.training.phases import Trained
from isoray.training.privacy import read_privacy

Row = dict[str, Any]


@dataclass(frozen=True)
class Exploration:
    """One exploration: its texts in order, and the new domain of each."""

    method: str
    seed: int
    found: list[Found]
    domains: list[str | None]


@dataclass(frozen=True)
class Explored:
    """All texts of a run with what is said of them."""

    found: list[Found]
    labelled: Labelled
    judge: JudgeConfig
    explore: ExploreConfig

    def explorations(self) -> list[Exploration]:
        """The explorations, in the order in which they were made."""
        places: dict[tuple[str, int], list[int]] = {}
        for place, one in enumerate(self.found):
            places.setdefault((one.method, one.seed), []).append(place)
        return [
            Exploration(*key, [self.found[place] for place in mine], [self.labelled.domains[place] for place in mine])
            for key, mine in places.items()
        ]

    @property
    def novel(self) -> list[str]:
        """The new domains that are looked for."""
        return list(self.judge.domains)

    def method_rows(self) -> list[Row]:
        """A row for each method: means over its explorations, with their standard deviations."""
        rows = []
        for method in dict.fromkeys(one.method for one in self.found):
            each = [self._measure(one) for one in self.explorations() if one.method == method]
            row: Row = {"method": method, "explorations": len(each), "texts": sum(int(one["texts"]) for one in each)}
            for name in each[0]:
                if name != "texts":
                    values = np.array([one[name] for one in each], float)
                    row |= {name: _mean(values), f"{name}_sd": _sd(values)}
            rows.append(row)
        return rows

    def _measure(self, one: Exploration) -> dict[str, float]:
        along = novelty.along([found.tokens[1:] for found in one.found], [found.text for found in one.found])
        values = {
            "texts": float(len(one.found)),
            "log_ratio": float(np.mean([found.log_ratio for found in one.found])),
            "perplexity": _perplexity(one.found),
            "distinct_2": float(along.distinct[2][-1]),
            "self_bleu": _mean(along.self_bleu_N),
        }
        if not self.novel:
            return values
        return {
            "precision": novelty.precision(one.domains, self.novel),
            "coverage": novelty.coverage(one.domains, self.novel),
            **values,
        }

    def curve_rows(self) -> Iterator[Row]:
        """After each text of each exploration: the share of domains found, and of texts that are new."""
        for one in self.explorations() if self.novel else ():
            curves = zip(
                novelty.coverage_curve(one.domains, self.novel),
                novelty.precision_curve(one.domains, self.novel),
                strict=True,
            )
            for number, (coverage, precision) in enumerate(curves, start=1):
                yield {
                    "method": one.method,
                    "exploration": one.seed,
                    "number": number,
                    "coverage": float(coverage),
                    "precision": float(precision),
                }

    def domain_rows(self) -> list[Row]:
        """For each method and new domain: texts per exploration, in how many it was found, and after how many texts."""
        rows = []
        for method in dict.fromkeys(one.method for one in self.found):
            mine = [one for one in self.explorations() if one.method == method]
            for domain in self.novel:
                hits = [novelty.hits(one.domains, self.novel)[domain] for one in mine]
                firsts = [novelty.first_hits(one.domains, self.novel)[domain] for one in mine]
                reached = [first for first in firsts if first is not None]
                rows.append(
                    {
                        "method": method,
                        "domain": domain,
                        "hits": float(np.mean(hits)),
                        "explorations": len(mine),
                        "found_by": len(reached),
                        "first": float(np.median(reached)) if reached else None,
                    }
                )
        return rows

    def text_rows(self, finding_of: Mapping[int, int]) -> Iterator[Row]:
        """Every text."""
        for place, one in enumerate(self.found):
            labels = {name: labels[place] for name, labels in self.labelled.labels.items()}
            yield {
                "method": one.method,
                "exploration": one.seed,
                "number": one.number + 1,
                "text": one.text,
                "log_ratio": one.log_ratio,
                "perplexity": _perplexity([one]),
                "domain": self.labelled.domains[place],
                "finding": finding_of.get(place),
                **{f"label/{name}": label.name for name, label in labels.items()},
                **{f"confidence/{name}": label.confidence for name, label in labels.items()},
            }

    def metrics(self) -> dict[str, float]:
        """``precision/iterative`` and so on."""
        names = ("precision", "coverage", "log_ratio", "perplexity", "distinct_2", "self_bleu")
        return {f"{name}/{row['method']}": row[name] for row in self.method_rows() for name in names if name in row}


def detection_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """``auroc/contrast`` and so on."""
    return {f"auroc/{row['score']}": row["auroc"] for row in rows if row["of"] is None}


def training_rows(trained: Mapping[str, Trained]) -> list[Row]:
    """A row for each training of the run."""
    rows = []
    for name, one in trained.items():
        last, privacy = one.log[-1] if one.log else {}, read_privacy(one.model) or {}
        rows.append(
            {
                "name": name,
                "steps": last.get("of"),
                "loss": last.get("loss"),
                "seconds": one.seconds,
                "peak_memory_mb": one.peak_memory_mb,
                "epsilon": privacy.get("epsilon"),
                "delta": privacy.get("delta"),
            }
        )
    return rows


def _perplexity(found: Sequence[Found]) -> float:
    """Of the texts under the fine-tune, over all their tokens."""
    nll = np.concatenate([-one.tuned_T for one in found if one.tuned_T is not None])
    return float(np.exp(min(nll.mean(), 700.0)))


def _mean(values: np.ndarray) -> float:
    sound = values[~np.isnan(values)]
    return float(sound.mean()) if len(sound) else math.nan


def _sd(values: np.ndarray) -> float | None:
    """Of the explorations; None of one."""
    return float(values.std(ddof=1)) if len(values) > 1 else None
