"""What an objective is: terms that are sums, the counts they are divided by, and their coefficients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from isoray.config.base import Component
from isoray.objectives.reduce import Batch

Batches = Mapping[str, Batch]
"""Micro-batch of each role, for example ``{"forget": ..., "retain": ...}``."""


class Objective(Component, ABC):
    """A loss as the loop sees it.

    The loop minimises ``sum over terms of coefficient * sum / count`` where sums and counts are taken over all
    micro-batches of all workers; so the result does not depend on accumulation, padding, packing or the number of
    workers. Terms are sums, never means.
    """

    roles: ClassVar[tuple[str, ...]] = ("train",)
    """Names of the batches it needs."""
    improves: ClassVar[Mapping[str, int]] = {}
    """Direction in which training moves each term: -1 falls, +1 rises."""
    takes_trees: ClassVar[bool] = False
    """Whether batches may come as prefix trees (:mod:`isoray.training.trees`): true of an objective that looks at them
    through :mod:`isoray.objectives.reduce` only."""

    @abstractmethod
    def weigh(self, batches: Batches) -> dict[str, Tensor]:
        """The count (int64 scalar) that each term is divided by, from the labels alone, before any forward pass."""

    @abstractmethod
    def terms(self, model: nn.Module, batches: Batches, reference: nn.Module | None = None) -> dict[str, Tensor]:
        """The sum (scalar with gradient) of each term; the same keys as :meth:`weigh`."""

    @abstractmethod
    def coefficients(self, step: int) -> dict[str, float]:
        """The factor of each term at optimizer step ``step`` (from 0); the same keys as :meth:`weigh`."""
