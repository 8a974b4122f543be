from __future__ import annotations

from pydantic import Field

from isoray.config.base import Component


class Fast(Component):
    class Config(Component.Config):
        speed: float = Field(default=1.0, gt=0, le=10)
        """How fast."""
        wheels: int = 4
        """How many wheels."""
