"""Gradient ascent on the negative log-likelihood: unlearning by minimising ``-L`` (UnTrac, section 3.1)."""

from __future__ import annotations

from typing import Literal

from isoray.objectives.lm import LanguageModelling


class GradientAscent(LanguageModelling):
    """Maximise the NLL of the batches: the model unlearns them."""

    improves = {"nll": +1}

    class Config(LanguageModelling.Config):
        """Settings of gradient ascent."""

        kind: Literal["gradient_ascent"] = "gradient_ascent"  # type: ignore[assignment]
        """Language modelling with the sign turned round."""

    config: Config

    def coefficients(self, step: int) -> dict[str, float]:
        """Always -1: the loop minimises, so the NLL rises."""
        return {"nll": -1.0}
