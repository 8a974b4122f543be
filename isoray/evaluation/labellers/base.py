"""What every labeller is: texts go in, the name of a domain for each comes out, and how sure that is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isoray.errors import NumericError, UserError
from isoray.evaluation.instrument import SHOWN_CHARS, Instrument

UNKNOWN = "unknown"
"""The label of texts that a labeller is not sure of, and of blank ones."""


@dataclass(frozen=True)
class Label:
    """What a text was taken for."""

    name: str
    confidence: float
    """In [0, 1], as each labeller defines it."""


class Labeller(Instrument):
    """A labeller in memory. A context manager: leaving it frees its model.

    Made with ``Labeller.build(config)``; asked through :func:`label_texts`, which checks what comes back.
    """

    class Config(Instrument.Config):
        """What every labeller's config has."""

        kind: str
        """Which labeller: `language`, `code`, `toxicity` or `corpus`."""

    config: Config

    @abstractmethod
    def label(self, texts: Sequence[str]) -> list[Label]:
        """The label of each of ``texts``; never asked for blank texts, or for none.

        A text's label does not depend on the texts beside it, but for rounding.
        """

    @property
    def held_out(self) -> list[dict[str, Any]]:
        """How well it tells texts that it was not made from: rows, of labellers that are trained when they are made."""
        return []


def label_texts(labeller: Labeller, texts: Sequence[str]) -> list[Label]:
    """The label of each of ``texts``, in their order.

    A text of nothing but white space is `UNKNOWN` with confidence 0 without being shown to the labeller. Raises
    NumericError for confidences outside [0, 1], UserError for a labeller that does not give one label, with a name,
    per text.
    """
    labels = [Label(UNKNOWN, 0.0)] * len(texts)
    shown = [number for number, text in enumerate(texts) if text.strip()]
    if not shown:
        return labels
    found = labeller.label([texts[number] for number in shown])
    if len(found) != len(shown):
        raise UserError(
            f"The labeller {labeller.kind!r} gave {len(found)} labels for {len(shown)} texts; its `label` must return "
            "one for each."
        )
    for number, label in zip(shown, found, strict=True):
        if not (isinstance(label.name, str) and label.name.strip()):
            raise UserError(
                f"The labeller {labeller.kind!r} gave {label.name!r} as the label's name for text {number}, which "
                f"begins {texts[number][:SHOWN_CHARS]!r}; a name must be a string that is not blank."
            )
        if not 0 <= label.confidence <= 1:
            raise NumericError(
                f"The labeller {labeller.kind!r} gave the confidence {label.confidence:g} for text {number}, which "
                f"begins {texts[number][:SHOWN_CHARS]!r}; it must lie between 0 and 1. Its model may be damaged or "
                "hold NaN: try it on a short text, and fetch or train the model again if that fails, too."
            )
        labels[number] = label
    return labels
