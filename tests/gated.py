"""Language modelling that stops in the middle of a training until a test lets it go on."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

from isoray.objectives.lm import LanguageModelling

STOP = 5
"""The step (from 0) that waits: one after the checkpoint of step 4."""
PATIENCE_S = 120.0


class Gated(LanguageModelling):
    """At step 5, a process leaves the file ``at-<pid>`` in ``gate`` and waits for ``go-<pid>`` or ``go``."""

    class Config(LanguageModelling.Config):
        """Language modelling and a gate."""

        kind: Literal["gated:Gated"] = "gated:Gated"  # type: ignore[assignment]
        """This class."""
        gate: str
        """A folder."""
        nan: bool = False
        """Whether the loss is NaN from there on."""
        bug: bool = False
        """Whether a bug strikes there."""

    config: Config

    def coefficients(self, step: int) -> dict[str, float]:
        """Those of language modelling."""
        if step >= STOP:
            self._wait()
            if self.config.bug:
                raise KeyError("a bug in an objective")
            if self.config.nan:
                return {"nll": float("nan")}
        return super().coefficients(step)

    def _wait(self) -> None:
        gate = Path(self.config.gate)
        (gate / f"at-{os.getpid()}").touch()
        deadline = time.monotonic() + PATIENCE_S
        while not ((gate / "go").exists() or (gate / f"go-{os.getpid()}").exists()):
            assert time.monotonic() < deadline, "the test never opened the gate"
            time.sleep(0.01)
