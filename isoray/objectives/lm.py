"""Language modelling: the negative log-likelihood of the labelled tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from isoray.config.base import Component
from isoray.objectives.base import Batches, Objective
from isoray.objectives.reduce import example_nll_sum, label_counts, token_nll


class LanguageModelling(Objective):
    """Minimise the NLL; ``average`` says of what."""

    improves = {"nll": -1}
    takes_trees = True

    class Config(Component.Config):
        """Settings of language modelling."""

        kind: Literal["lm"] = "lm"
        """Negative log-likelihood of the labelled tokens."""
        average: Literal["token", "example"] = "token"
        """`token`: every labelled token of the batch weighs the same. `example`: every row weighs the same, whatever
        its length."""

    config: Config

    def weigh(self, batches: Batches) -> dict[str, Tensor]:
        """Labelled tokens, or rows that have any."""
        counts_B = label_counts(batches["train"])
        return {"nll": counts_B.sum() if self.config.average == "token" else (counts_B > 0).sum()}

    def terms(self, model: nn.Module, batches: Batches, reference: nn.Module | None = None) -> dict[str, Tensor]:
        """Summed NLL over tokens, or over the rows' means."""
        if self.config.average == "token":
            return {"nll": token_nll(model, batches["train"]).nll_N.sum()}
        return {"nll": example_nll_sum(model, batches["train"])}

    def coefficients(self, step: int) -> dict[str, float]:
        """Always 1."""
        return {"nll": 1.0}
