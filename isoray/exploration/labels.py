"""What is said of each text: its labels, and which of the new domains it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isoray.evaluation.labellers.base import Label, Labeller, label_texts
from isoray.exploration.config import JudgeConfig


@dataclass(frozen=True)
class Labelled:
    """The labels of some texts."""

    labels: Mapping[str, list[Label]]
    """By labeller, in the texts' order."""
    domains: list[str | None]
    """The new domain of each; None: of none."""


class Labelling:
    """The labellers of a run, each made once."""

    def __init__(self, config: JudgeConfig) -> None:
        """Raises UserError and DataError for labellers that cannot be made."""
        self._config = config
        self.labellers: dict[str, Labeller] = {
            name: Labeller.build(labeller) for name, labeller in config.labels.items()
        }

    def label(self, texts: Sequence[str]) -> Labelled:
        """The labels of ``texts``."""
        cut = [text[: self._config.chars] for text in texts]
        labels = {name: label_texts(labeller, cut) for name, labeller in self.labellers.items()}
        return Labelled(labels, [self._domain(labels, number) for number in range(len(texts))])

    def rows(self) -> list[dict[str, Any]]:
        """How well labellers that were trained tell texts that they were not trained on."""
        return [{"labeller": name, **row} for name, labeller in self.labellers.items() for row in labeller.held_out]

    def _domain(self, labels: Mapping[str, list[Label]], number: int) -> str | None:
        for name, domain in self._config.domains.items():
            if labels[domain.by][number].name == domain.label:
                return name
        return None
