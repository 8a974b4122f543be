"""The model that a fine-tune is contrasted with: a copy of the pre-trained one that learns what was found already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from isoray.corpora.store import IGNORED, Block, Int32Array
from isoray.corpora.stream import BlockRef
from isoray.exploration.config import LearnConfig
from isoray.models.snapshot import Snapshot
from isoray.objectives.lm import LanguageModelling
from isoray.training.config import ComputeConfig, TrainingConfig
from isoray.training.loop import Step, train
from isoray.training.parallel import Parallel, Ranks

Tokens = tuple[int, ...]
"""A whole text, from its start token on."""


class Reference:
    """One optimizer step on each text, in their order, with the optimizer's state kept (Isonuma and Titov, 2025).

    What it is after some texts is a function of the texts alone: it never has to be stored, and whoever lacks some of
    them takes the missing steps.
    """

    def __init__(
        self, model: nn.Module, folder: Path, learn: LearnConfig, *, ranks: Ranks, compute: ComputeConfig, seed: int
    ) -> None:
        """``model``, loaded from ``folder``, is trained in place."""
        self._parallel = Parallel(model, ranks, compute)
        self._snapshot = Snapshot(model, folder)
        self._learn, self._seed = learn, seed
        self._texts = _Texts()
        self._steps: Iterator[Step] | None = None

    @property
    def learnt(self) -> tuple[Tokens, ...]:
        """What it has learnt so far."""
        return tuple(self._texts.texts)

    def learn(self, texts: Sequence[Tokens]) -> None:
        """Be the pre-trained model that has learnt ``texts``, in this order, and nothing else.

        Raises NumericError where a loss or gradient is not finite.
        """
        known = len(self._texts.texts)
        if tuple(texts[:known]) != self.learnt:
            self._restart()
            known = 0
        for text in texts[known:]:
            self._texts.texts.append(text)
            if self._steps is None:
                self._steps = self._training()
            next(self._steps)

    def _restart(self) -> None:
        self._texts = _Texts()
        if self._steps is not None:
            self._steps = None
            self._snapshot.restore(self._parallel.model)

    def _training(self) -> Iterator[Step]:
        settings = TrainingConfig(
            steps=MOST_TEXTS,
            batch_size=1,
            optimizer=self._learn.optimizer,
            clip_norm=self._learn.clip_norm,
            log_every=1,
        )
        objective = LanguageModelling(LanguageModelling.Config())
        streams = {"train": self._texts}
        return train(self._parallel, objective, streams, settings, seed=self._seed, pad_token_id=0)


MOST_TEXTS = 10**9


class _Texts:
    """The stream of what is learnt: step k sees text k, which must be there by then."""

    steps_per_epoch = MOST_TEXTS

    def __init__(self) -> None:
        self.texts: list[Tokens] = []

    def refs(self, step: int) -> list[BlockRef]:
        """The text of step ``step``."""
        return [BlockRef(0, step)]

    def lengths(self, refs: Sequence[BlockRef]) -> Int32Array:
        """int32: tokens of each."""
        return np.array([len(self.texts[ref.index]) for ref in refs], np.int32)

    def load(self, refs: Sequence[BlockRef]) -> list[Block]:
        """The texts as blocks: loss is taken on every token but the first."""
        return [_block(self.texts[ref.index]) for ref in refs]


def _block(text: Tokens) -> Block:
    ids = np.array(text, np.int32)
    labels = ids.copy()
    labels[0] = IGNORED
    return Block(ids, labels, np.zeros_like(ids))
