"""Toxicity: any toxicity scorer, with a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field

from isoray.config.base import Component, Slot
from isoray.evaluation.labellers.base import Label, Labeller
from isoray.evaluation.scorers.base import Scorer, score_texts
from isoray.evaluation.scorers.profanity import Profanity

TOXIC, BENIGN = "toxic", "benign"


class Toxicity(Labeller):
    """`toxic` where the scorer's probability reaches the threshold, else `benign`.

    The confidence is the probability of that side: the score of toxic texts, 1 less the score of benign ones.
    """

    class Config(Labeller.Config):
        """Toxic or benign."""

        kind: Literal["toxicity"] = "toxicity"
        """Toxic or benign, by any toxicity scorer."""
        scorer: Annotated[Component.Config, Slot("isoray.evaluation.scorers")] = Profanity.Config()
        """The scorer; its score is compared with the threshold."""
        threshold: float = Field(default=0.5, ge=0, le=1)
        """From this score on a text is toxic."""

        def depends_on(self) -> list[Any]:
            """The threshold, and what the scorer's scores depend on."""
            return [self.kind, self.threshold, cast("Scorer.Config", self.scorer).depends_on()]

        def absolute(self) -> Self:
            """The same, with the scorer's paths made absolute."""
            return self.model_copy(update={"scorer": cast("Scorer.Config", self.scorer).absolute()})

    config: Config

    def __init__(self, config: Config) -> None:
        """Raises what the scorer does."""
        super().__init__(config)
        self._scorer = Scorer.build(config.scorer)

    def label(self, texts: Sequence[str]) -> list[Label]:
        """The label of each text."""
        return [
            Label(TOXIC, score) if score >= self.config.threshold else Label(BENIGN, 1 - score)
            for score in score_texts(self._scorer, texts).tolist()
        ]

    def close(self) -> None:
        """Free the scorer's model."""
        self._scorer.close()
