"""What scorers and labellers have in common: a model in memory that texts are shown to."""

from __future__ import annotations

from abc import ABC
from typing import Any, Self

from isoray.config.base import Component

SHOWN_CHARS = 60
"""So much of a text is shown in an error, at most."""


class Instrument(Component, ABC):
    """Something in memory that texts are shown to. A context manager: leaving it frees its model."""

    class Config(Component.Config):
        """What the config of each has."""

        kind: str
        """Which one."""

        def depends_on(self) -> list[Any]:
            """All that its answers depend on, JSON-able: the settings, and in subclasses the content of files."""
            return [self.model_dump(mode="json")]

        def absolute(self) -> Self:
            """The same, with local paths that hold in another working folder, too."""
            return self

    config: Config

    def close(self) -> None:
        """Free the model."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
