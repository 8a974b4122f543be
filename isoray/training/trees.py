"""Examples that begin alike, laid out so that what they share is computed once.

Sets are often made from templates, and a causal model's states over a common beginning are common too. The
examples of a set form a tree of tokens: one path each, shared as far as they agree. Laid out in depth-first order, with
a token's depth as its position, and attending to its ancestors only, one forward pass gives every example the same
states as a pass of its own, and one backward pass the gradients, up to rounding. Tokens after the last predicting one
are left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from isoray.corpora.store import IGNORED, Block
from isoray.models.structure import plain
from isoray.objectives.reduce import row_nll
from isoray.training.parallel import Parallel

WIDTH = 256
"""Most tokens of one tree. Attention runs over all pairs of them, so a larger one saves less than it costs."""
WORTH = 0.8
"""Trees are used when they hold at most this share of the examples' tokens."""

_works: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass
class Tree:
    """Tokens in depth-first order; a branch that came to its end knows it."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Of each token: the place after its last descendant."""
    predictions: list[tuple[int, int, int]] = field(default_factory=list)
    """Place of the predicting token, label, number of the example."""
    path: list[int] = field(default_factory=list)
    """Places of the latest example's tokens."""

    def __len__(self) -> int:
        return len(self.tokens)

    def shared(self, ids: np.ndarray) -> int:
        """How many tokens of ``ids`` are on the latest path already."""
        path = np.array([self.tokens[place] for place in self.path[: len(ids)]], np.int64)
        differ = np.flatnonzero(path != ids[: len(path)])
        return int(differ[0]) if len(differ) else len(path)

    def add(self, number: int, ids: np.ndarray, labels: np.ndarray) -> None:
        """Add an example: its predicting tokens and the labels that follow each."""
        shared = self.shared(ids)
        for depth, token in enumerate(ids[shared:].tolist(), start=shared):
            self.path[depth:] = [len(self.tokens)]
            self.tokens.append(token)
            self.depths.append(depth)
            self.ends.append(0)
        del self.path[len(ids) :]
        for place in self.path:
            self.ends[place] = len(self.tokens)
        for depth in np.flatnonzero(labels != IGNORED).tolist():
            self.predictions.append((self.path[depth], int(labels[depth]), number))


def plant(blocks: Sequence[Block], *, first: int = 0) -> list[Tree] | None:
    """Trees of the examples ``blocks``, numbered from ``first``; None where they would save too little or a block is
    long or packed."""
    kept: list[tuple[bytes, int, np.ndarray, np.ndarray]] = []
    for number, block in enumerate(blocks, start=first):
        if len(block.input_ids) > WIDTH or block.segment_ids[-1] != block.segment_ids[0]:
            return None
        labelled = np.flatnonzero(block.labels[1:] != IGNORED)
        if len(labelled):
            predicting = int(labelled[-1]) + 1
            ids = block.input_ids[:predicting]
            # Big-endian bytes sort as the numbers do: examples that begin alike come together.
            kept.append((ids.astype(">u4").tobytes(), number, ids, block.labels[1 : predicting + 1]))
    trees: list[Tree] = []
    for _, number, ids, labels in sorted(kept, key=lambda example: example[:2]):
        if not trees or len(trees[-1]) + len(ids) - trees[-1].shared(ids) > WIDTH:
            trees.append(Tree())
        trees[-1].add(number, ids, labels)
    saves = sum(map(len, trees)) <= WORTH * sum(len(block.input_ids) for block in blocks)
    return trees if trees and saves else None


def cut(trees: Sequence[Tree], *, max_tokens: int) -> Iterator[Sequence[Tree]]:
    """The trees in order, in runs whose number x widest stays within ``max_tokens``, of at least one tree."""
    rows = max(1, max_tokens // max(map(len, trees)))
    return (trees[start : start + rows] for start in range(0, len(trees), rows))


def examples(trees: Sequence[Tree]) -> list[int]:
    """Numbers of the examples that the rows of ``to_batch(trees)`` stand for, in their order."""
    return list(dict.fromkeys(number for tree in trees for _, _, number in tree.predictions))


def to_batch(trees: Sequence[Tree], *, pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """A batch for the losses of :mod:`isoray.objectives.reduce`, one tree per row of tokens.

    ``input_ids``, ``position_ids``, ``subtree_ends`` int64 [B, T]; ``predicts`` bool [B, T]: where the head is needed;
    ``predictors`` int64 [N]: which of these positions predicts each label; ``targets``, ``owners`` int64 [N]: each
    label and its example; ``counts`` int64 [E]: each example's number of labels.
    """
    width = max(map(len, trees))
    shape = (len(trees), width)
    ids, depths = np.full(shape, pad_token_id, np.int64), np.zeros(shape, np.int64)
    ends = np.tile(np.arange(1, width + 1), (len(trees), 1))  # padding sees itself: nothing at all would give NaN
    for row, tree in enumerate(trees):
        ids[row, : len(tree)], depths[row, : len(tree)], ends[row, : len(tree)] = tree.tokens, tree.depths, tree.ends
    places = np.array([row * width + place for row, tree in enumerate(trees) for place, _, _ in tree.predictions])
    unique, predictors = np.unique(places, return_inverse=True)
    predicts = np.zeros(len(trees) * width, np.bool_)
    predicts[unique] = True
    index = {number: row for row, number in enumerate(examples(trees))}
    owners = np.array([index[number] for tree in trees for _, _, number in tree.predictions])
    arrays = {
        "input_ids": ids,
        "position_ids": depths,
        "subtree_ends": ends,
        "predicts": predicts.reshape(shape),
        "predictors": predictors,
        "targets": np.array([label for tree in trees for _, label, _ in tree.predictions]),
        "owners": owners,
        "counts": np.bincount(owners),
    }
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def supported(parallel: Parallel) -> bool:
    """Whether the model computes trees as it computes their examples; tried once per model, on two short examples.

    A model may mix positions by other means than attention, or take no mask and positions from outside.
    """
    model = parallel.model
    if model not in _works:
        inner = plain(model)
        kinds = getattr(inner.config, "layer_types", None) or ["full_attention"]
        takes = "position_ids" in inspect.signature(inner.forward).parameters
        _works[model] = takes and set(kinds) == {"full_attention"} and _agrees(parallel)
    return _works[model]


def _agrees(parallel: Parallel) -> bool:
    rows = [np.array([0, 1, 2, branch, 1, 0], np.int32) for branch in (0, 2)]
    tree = Tree()
    for number, ids in enumerate(rows):
        tree.add(number, ids[:-1], ids[1:])
    device = parallel.ranks.device
    got_B, _ = parallel.evaluate(row_nll, to_batch([tree], pad_token_id=0, device=device))
    ids_BT = torch.from_numpy(np.stack(rows)).long().to(device)
    want_B, _ = parallel.evaluate(row_nll, {"input_ids": ids_BT, "labels": ids_BT})
    lowest = torch.bfloat16 if parallel.compute.precision == "bf16" else next(parallel.model.parameters()).dtype
    return torch.allclose(got_B, want_B, rtol=4 * torch.finfo(lowest).eps ** 0.75)
