from __future__ import annotations

from isoray.config.base import Component


class Slow(Component):
    class Config(Component.Config):
        patience: int = 3
        """How patient."""
