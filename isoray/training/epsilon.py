"""What private training costs: epsilon by Opacus' accountants, and the noise that keeps it within bounds.

Both are pure functions of the settings. Opacus, an optional dependency, is imported when they are called.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np

from isoray.errors import UserError

Accountant = Literal["rdp", "prv", "gdp"]

PRV_POINTS = 5e6
"""The largest table that `prv` may make, in numbers: with its copies it stays below about 1 GB."""

PRV_TARGET = 20.0
"""The largest epsilon that noise is sought for with `prv`: on the way it looks at amounts several times as large."""


@functools.lru_cache(maxsize=256)
def epsilon_spent(kind: Accountant, noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """The epsilon, at ``delta``, of ``steps`` steps that draw each example with the chance ``rate``.

    ``noise_multiplier`` is the noise's standard deviation over the largest norm of an example's gradient. Raises
    UserError where the accountant cannot tell.
    """
    if kind == "prv":
        _check_table(epsilon_spent("rdp", noise_multiplier, rate, steps, delta), steps, delta)
    with _quiet():
        from opacus.accountants import create_accountant

        accountant = create_accountant(kind)
        accountant.history = [(noise_multiplier, rate, steps)]
        return max(0.0, float(accountant.get_epsilon(delta=delta)))


@functools.lru_cache(maxsize=256)
def noise_multiplier_for(kind: Accountant, epsilon: float, rate: float, steps: int, delta: float) -> float:
    """The least noise multiplier, to within 0.01 of epsilon, with which ``steps`` steps stay within ``epsilon``.

    Raises UserError where no noise does, or the accountant cannot tell.
    """
    if kind == "prv" and epsilon > PRV_TARGET:
        raise UserError(f"training.privacy: with the accountant `prv` epsilon must be at most {PRV_TARGET}; use `rdp`.")
    if kind == "rdp" and epsilon <= (least := _least_epsilon_of_rdp(delta)):
        raise UserError(
            f"training.privacy: the accountant `rdp` cannot show an epsilon below {least:.3g} at delta {delta:.3g}, "
            f"whatever the noise, and {epsilon} is asked for. Set the accountant to `prv`, or allow more."
        )
    with _quiet():
        from opacus.accountants.utils import get_noise_multiplier

        try:
            found = get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=rate,
                steps=steps,
                accountant=kind,
                epsilon_tolerance=min(0.01, 0.01 * epsilon),
            )
        except ValueError as error:
            raise UserError(
                f"training.privacy: no noise keeps {steps} steps within epsilon {epsilon} at delta {delta:.3g} "
                f"({error}) Allow more epsilon, or train for fewer steps or with smaller batches."
            ) from error
    return float(found)


def _check_table(bound: float, steps: int, delta: float) -> None:
    """Raises UserError where `prv` would take gigabytes; ``bound`` is about the largest loss that its table holds."""
    mesh = 0.01 / math.sqrt(steps * math.log(12 / (delta / 1000)) / 2)  # as Opacus chooses it
    if 2 * bound / mesh > PRV_POINTS:
        raise UserError(
            "training.privacy.accountant is `prv`, which would take gigabytes for an epsilon as large as this "
            f"training's (up to {bound:.3g}): set it to `rdp`, or add noise."
        )


def _least_epsilon_of_rdp(delta: float) -> float:
    """What the orders that are tried make of no information at all."""
    with _quiet():
        from opacus.accountants import RDPAccountant
        from opacus.accountants.analysis.rdp import get_privacy_spent

        orders = RDPAccountant.DEFAULT_ALPHAS
        return float(get_privacy_spent(orders=orders, rdp=[0.0] * len(orders), delta=delta)[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Opacus' remarks: that `gdp` may be too small, which our settings say; on the orders that `rdp` tries,
    which make the bound looser but never wrong; on the logarithm of 0 that `prv` takes where all examples are drawn."""
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", message="GDP accounting is experimental")
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield
