"""What every recipe is: a Component that is run once in a run folder."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pydantic import Field

from isoray.config.base import Component, Config
from isoray.run import Run


class StorageConfig(Config):
    """Where runs are written."""

    path: str = "runs"
    """Folder that holds the run folders; on a cluster, one that every node reaches."""


class Recipe(Component, ABC):
    """One system, from its corpora to its results."""

    class Config(Component.Config):
        """What every recipe's config file has."""

        kind: str
        """Which recipe: the name of its module in `isoray.recipes`, or `package.module:Class`."""
        seed: int = Field(default=0, ge=0)
        """Every random choice hangs on it."""
        storage: StorageConfig = StorageConfig()
        """Where runs are written."""

    @abstractmethod
    def run(self, run: Run) -> None:
        """Do the work in ``run.folder``, step by step, and end with ``run.finish(...)``."""
