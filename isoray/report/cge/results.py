"""The results of an exploration, as its report asks for them. Any value may be missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from isoray.report.cge.heat import visible
from isoray.report.numbers import MINUS, finite
from isoray.report.page import RunFiles
from isoray.report.svg import Style

LABELS = {"iterative": "Iterative CGE", "static": "Static CGE", "sampling": "Sampling", "ngram": "n\u2011grams"}
UNKNOWN = "unknown"
"""What labellers say of texts that they are not sure of."""
LEVEL = "95%"
"""Level of all intervals of this recipe."""
_OTHERS = tuple(Style(f"s{number}", number) for number in (1, 2, 3, 4, 6))

Row = Mapping[str, Any]


def label(method: str) -> str:
    """A method's name for people."""
    return LABELS.get(method, method)


@dataclass(frozen=True)
class Named:
    """The most common name among the texts of a finding, and the share of its texts that bear it."""

    name: str | None
    share: float | None


@dataclass(frozen=True)
class Group:
    """A finding: texts that belong together."""

    number: int
    texts: int
    share: float | None
    explorations: int
    """In how many it was found."""
    first: float | None
    contrast: float | None
    """Mean over its texts, in nats a token."""
    low: float | None
    high: float | None
    above_ordinary: float | None
    """Share of the fine-tune's ordinary texts whose contrast is lower."""
    words: list[str]
    domain: Named
    labels: dict[str, Named]
    examples: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What most of its texts are called: by domain, else by the first labeller; else its foremost words."""
        for named in (self.domain, *list(self.labels.values())[:1]):
            if named.name and named.name != UNKNOWN and (named.share or 0.0) >= 0.5:
                return named.name
        return self.told_words or f"finding {self.number}"

    @property
    def told_words(self) -> str:
        """``“if, return, 0”``; empty without words."""
        return f"\u201c{', '.join(self.words[:3])}\u201d" if self.words else ""


class Exploration:
    """All that a run tells of its explorations."""

    def __init__(self, run: RunFiles) -> None:
        self.metrics = run.metrics
        self.config: Row = mapping((run.config or {}).get("explore"))
        self.methods = {str(row["method"]): row for row in run.table("methods") if row.get("method") is not None}
        self.domain_rows = [r for r in run.table("domains") if r.get("domain") is not None and r.get("method")]
        self.curves = run.table("curves")
        lineage = mapping(mapping(run.results.get("lineage")).get("models"))
        self._weights = [lineage.get(name) for name in ("base", "tuned")]
        examples: dict[int, list[Row]] = {}
        for row in run.table("examples"):
            if isinstance(row.get("pieces"), list) and (number := finite(row.get("finding"))) is not None:
                examples.setdefault(int(number), []).append(row)
        self._groups = list(_groups(run.table("findings"), examples))

    @property
    def is_new(self) -> bool | None:
        """Whether the fine-tune differs from its pre-trained model; None where that was not measured."""
        known = finite(self.metrics.get("new"))
        return None if known is None else known > 0

    @property
    def identical(self) -> bool:
        """Whether both models have the same weights."""
        divergence = self.divergence
        same = self._weights[0] is not None and self._weights[0] == self._weights[1]
        return same or (divergence[0] == 0 and divergence[1] in (0, None) and divergence[2] in (0, None))

    @property
    def divergence(self) -> tuple[float | None, float | None, float | None]:
        """Of the fine-tune from the pre-trained model, in nats a token, with its interval."""
        names = ("divergence", "divergence_low", "divergence_high")
        value, low, high = (finite(self.metrics.get(name)) for name in names)
        return value, low, high

    @property
    def groups(self) -> list[Group]:
        """The findings; none where nothing is new."""
        return [] if self.is_new is False else self._groups

    @property
    def main(self) -> str:
        """The method that findings are told from."""
        return next(iter(self.methods), "")

    @property
    def made(self) -> int:
        """Explorations by the main method."""
        known = finite(self.methods.get(self.main, {}).get("explorations"))
        return int(known) if known else max((group.explorations for group in self._groups), default=1)

    @property
    def domains(self) -> list[str]:
        """The new domains that are known."""
        return list(dict.fromkeys(str(row["domain"]) for row in self.domain_rows))

    @cached_property
    def styles(self) -> dict[str, Style]:
        """How each method looks in every chart."""
        others = [method for method in self.methods if method != self.main]
        looks = {method: _OTHERS[place % len(_OTHERS)] for place, method in enumerate(others)}
        return {self.main: Style("ours", 0)} | looks

    def found(self, method: str) -> tuple[float | None, float | None]:
        """How many of the known domains a method found: mean and standard deviation over its explorations."""
        row, number = self.methods.get(method, {}), len(self.domains)
        mean, sd = finite(row.get("coverage")), finite(row.get("coverage_sd"))
        return (None if mean is None else mean * number), (None if sd is None else sd * number)

    def domain(self, method: str, domain: str) -> Row:
        mine = (r for r in self.domain_rows if (str(r["method"]), str(r["domain"])) == (method, domain))
        return next(mine, {})


def power(value: float | None) -> str:
    """``1e-5`` for what may be very small; an en dash for None."""
    return "\u2013" if value is None else f"{value:.3g}".replace("e-0", "e-").replace("-", MINUS)


def mapping(value: object) -> Row:
    """``value`` if it is a mapping; else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _groups(rows: Iterable[Row], examples: Mapping[int, list[Row]]) -> Iterable[Group]:
    for place, row in enumerate(rows, start=1):
        number = int(finite(row.get("finding")) or place)
        words = row.get("words")
        yield Group(
            number=number,
            texts=int(finite(row.get("texts")) or 0),
            share=finite(row.get("share")),
            explorations=int(finite(row.get("explorations")) or 0),
            first=finite(row.get("first")),
            contrast=finite(row.get("log_ratio")),
            low=finite(row.get("log_ratio_low")),
            high=finite(row.get("log_ratio_high")),
            above_ordinary=finite(row.get("above_ordinary")),
            words=[visible(word) for word in words if isinstance(word, str)] if isinstance(words, list) else [],
            domain=_named(row.get("domain")),
            labels={str(by): _named(named) for by, named in mapping(row.get("labels")).items()},
            examples=examples.get(number, []),
        )


def _named(value: object) -> Named:
    held = mapping(value)
    name = held.get("name")
    return Named(None if name is None else str(name), finite(held.get("share")))
