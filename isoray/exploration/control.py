"""Whether a fine-tune has learnt anything: how far it is from the pre-trained model on texts of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isoray.evaluation.bootstrap import Interval, interval
from isoray.exploration.config import ExploreConfig
from isoray.exploration.explore import Explorer, Found


@dataclass(frozen=True)
class Control:
    """Texts sampled from the fine-tune alone, and the divergence that they estimate."""

    divergence: Interval
    """KL divergence of the fine-tune from the pre-trained model, in nats a token."""
    is_new: bool
    """Whether it is above what counts as nothing."""
    identical: bool
    """Whether both models have the same weights, to the last bit."""
    found: tuple[Found, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """For ``results.json``."""
        low, high = self.divergence.low, self.divergence.high
        return {
            "divergence": self.divergence.estimate,
            "divergence_low": low,
            "divergence_high": high,
            "new": float(self.is_new),
        }


def control(explorer: Explorer, config: ExploreConfig, *, identical: bool) -> Control:
    """Sample from the fine-tune and compare. Identical models need no sample: their divergence is 0."""
    if identical:
        return Control(Interval(0.0, 0.0, 0.0), is_new=False, identical=True, found=())
    found = tuple(explorer.tell(explorer.sample("control", config.control)))
    divergence = interval(np.array([one.log_ratio for one in found]), seed=explorer.seed)
    is_new = not divergence.high < config.nothing_below  # the interval of a single text is NaN
    return Control(divergence, is_new, identical=False, found=found)
