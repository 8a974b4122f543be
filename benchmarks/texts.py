"""Blocks in memory, for the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isoray.corpora.store import Block


@dataclass(frozen=True)
class Texts:
    """Blocks in memory, with a store's interface."""

    name: str
    blocks: Sequence[Block]

    @property
    def digest(self) -> str:
        return self.name

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(block.input_ids) for block in self.blocks], np.int32)

    @property
    def label_counts(self) -> np.ndarray:
        return np.array([(block.labels != -100).sum() for block in self.blocks], np.int32)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Block:
        return self.blocks[index]
