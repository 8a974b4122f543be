"""A key-value cache whose rows can be filled, freed and filled again while the others go on.

All rows write at one shared *column*: a sequence that begins later, or has a shorter prompt, begins further to the
right, and what lies to the left of its start is masked out. So one step is one write and one view per layer, however
long the sequences are, and nothing is copied while they grow. Positions are those of the sequence, not of the column.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

ROOM = 64
"""Columns by which a cache grows at least."""


class Columns:
    """Where the sequences of all rows are; shared by the caches of all models of an engine."""

    def __init__(self, slots: int, device: torch.device, *, fixed: int | None = None) -> None:
        self.slots = slots
        self.device = device
        self.fixed = fixed
        """Number of columns of a cache whose shapes never change: all rows and columns take part in every step. None:
        it grows, and a step sees what is in use."""
        self.size = fixed or 0
        """Columns that the buffers have."""
        self.now = 0
        """The column that the next token is written to."""
        self.now_1 = torch.zeros(1, dtype=torch.int64, device=device)
        """``now`` where compiled code reads it."""
        self.starts: list[int] = []
        """First column of each row's sequence."""

    @property
    def first(self) -> int:
        """The first column that any row uses."""
        return min(self.starts, default=self.now)

    @property
    def active(self) -> int:
        """How many rows a step computes."""
        return self.slots if self.fixed else len(self.starts)

    def view(self) -> slice:
        """The columns that attention looks at in the next step."""
        return slice(0, self.size) if self.fixed else slice(self.first, self.now + 1)

    def go_to(self, now: int) -> None:
        """Make ``now`` the column that the next token is written to."""
        self.now = now
        self.now_1.fill_(now)

    def mask(self) -> Tensor | None:
        """What each row may attend to in the next step (bool); None: everything.

        [rows, columns of the view]; of a fixed cache [slots, 1, 1, columns], in which idle rows see their own token.
        """
        view = self.view()
        if not self.fixed and all(start == view.start for start in self.starts):
            return None
        columns_C = torch.arange(view.start, view.stop, device=self.device)
        starts = self.starts + [self.now] * (self.active - len(self.starts))
        mask_RC = (columns_C >= torch.tensor(starts, device=self.device)[:, None]) & (columns_C <= self.now)
        return mask_RC[:, None, None] if self.fixed else mask_RC

    def positions(self) -> Tensor:
        """The position of each row's next token [rows, 1]."""
        idle = [[0]] * (self.active - len(self.starts))
        return torch.tensor([[self.now - start] for start in self.starts] + idle, device=self.device)


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer: buffers [slots, heads, columns, head size]."""

    is_sliding = False

    def __init__(self, columns: Columns) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.columns = columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers for keys and values of these shapes; zeros, since what is masked must still be a number."""
        size = self.columns.size
        self.keys, self.values = (
            states.new_zeros(self.columns.slots, states.shape[1], size, states.shape[3])
            for states in (key_states, value_states)
        )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token per row at the current column; what attention looks at."""
        assert self.keys is not None and self.values is not None
        if self.columns.fixed:
            self.keys.index_copy_(2, self.columns.now_1, key_states)
            self.values.index_copy_(2, self.columns.now_1, value_states)
            return self.keys, self.values
        rows, now, view = key_states.shape[0], self.columns.now, self.columns.view()
        self.keys[:rows, :, now : now + 1] = key_states
        self.values[:rows, :, now : now + 1] = value_states
        return self.keys[:rows, :, view], self.values[:rows, :, view]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns that a mask has, and the first of them."""
        view = self.columns.view()
        return view.stop - view.start, 0

    def get_seq_length(self) -> int:
        """Columns before the current one, as far as attention looks at them."""
        start: int = self.columns.view().start
        return self.columns.now - start

    def get_max_length(self) -> int:
        """-1: it grows."""
        return self.columns.fixed or -1


class SlotCache(Cache):
    """The cache of one model. Which rows there are says its :class:`Columns`; :class:`Slots` changes them."""

    def __init__(self, columns: Columns, layers: int) -> None:
        super().__init__(layers=[SlotLayer(columns) for _ in range(layers)])


class Slots:
    """The rows of an engine: the caches of all its models, kept in step."""

    def __init__(self, slots: int, device: torch.device, *, fixed: int | None = None) -> None:
        self.columns = Columns(slots, device, fixed=fixed)
        self.caches: dict[str, SlotCache] = {}

    @property
    def rows(self) -> int:
        """Rows in use."""
        return len(self.columns.starts)

    def append(self, prefilled: dict[str, DynamicCache], lengths: list[int], copies: list[int]) -> None:
        """New rows from prefilled prompts (padded on the left), ``copies`` rows of each, after those in use.

        ``lengths`` are the prompts' lengths without padding.
        """
        width, columns = max(lengths), self.columns
        if self.rows == 0:
            columns.go_to(width)
        elif columns.now < width:
            self._grow(width + 1)
            self._move(width - columns.now)
        self._make_room()
        first, now = self.rows, columns.now
        source = [index for index, count in enumerate(copies) for _ in range(count)]
        columns.starts += [now - lengths[index] for index in source]
        for role, cache in prefilled.items():
            layers: Any = zip(self._cache(role, cache).layers, cache.layers, strict=True)
            for layer, new in layers:
                for buffer, states in ((layer.keys, new.keys), (layer.values, new.values)):
                    buffer[first : self.rows, :, now - width : now] = states[source]

    def advance(self) -> None:
        """The column was written by all models: go on to the next."""
        self.columns.go_to(self.columns.now + 1)
        self._make_room()

    def remove(self, rows: list[int]) -> dict[int, int]:
        """Free ``rows``; the last ones move into the gaps: {old row: new row} for those that moved."""
        moved: dict[int, int] = {}
        gone = set(rows)
        keep = self.rows - len(gone)
        sources = [row for row in range(keep, self.rows) if row not in gone]
        for target, source in zip(sorted(row for row in gone if row < keep), sources, strict=True):
            moved[source] = target
            self.columns.starts[target] = self.columns.starts[source]
        if moved:
            self._take(list(moved.values()), list(moved))
        del self.columns.starts[keep:]
        return moved

    def wipe(self, rows: list[int]) -> None:
        """Make zeros of what is in ``rows`` and in idle ones, which may hold what is no number.

        Attention multiplies what is masked by 0; whoever gets the row next must not meet 0 * NaN there.
        """
        for layer, name in self._buffers():
            buffer = getattr(layer, name)
            buffer[rows] = 0
            buffer[self.rows :] = 0

    def reorder(self, parents: dict[int, int]) -> None:
        """Each row that is named goes on from what is in its parent's."""
        changed = {row: parent for row, parent in parents.items() if row != parent}
        if changed:
            starts = [self.columns.starts[parent] for parent in changed.values()]
            self._take(list(changed), list(changed.values()))
            for row, start in zip(changed, starts, strict=True):
                self.columns.starts[row] = start

    def _cache(self, role: str, like: DynamicCache) -> SlotCache:
        if role not in self.caches:
            self.caches[role] = SlotCache(self.columns, len(like.layers))
            layers: Any = zip(self.caches[role].layers, like.layers, strict=True)
            for layer, new in layers:
                layer.lazy_initialization(new.keys, new.values)
        return self.caches[role]

    def _buffers(self) -> Iterator[tuple[Any, str]]:
        """Layer and attribute of each buffer."""
        for cache in self.caches.values():
            for layer in cache.layers:
                yield layer, "keys"
                yield layer, "values"

    def _take(self, targets: list[int], sources: list[int]) -> None:
        used = slice(self.columns.first, self.columns.now)
        for layer, name in self._buffers():
            buffer = getattr(layer, name)
            buffer[targets, :, used] = buffer[sources, :, used]

    def _make_room(self) -> None:
        """See to it that the current column exists: move everything to the left, or grow."""
        columns = self.columns
        if columns.now < columns.size:
            return
        if self.rows and (columns.fixed or columns.first >= max(columns.size // 2, 1)):
            assert columns.first > 0, "a sequence is longer than the context"
            self._move(-columns.first)
        self._grow(columns.now + 1)

    def _grow(self, size: int) -> None:
        """Let the buffers have ``size`` columns at least, and some more."""
        columns = self.columns
        if size <= columns.size:
            return
        assert columns.fixed is None
        columns.size = max(size + ROOM, columns.size * 3 // 2)
        for layer, name in self._buffers():
            buffer = getattr(layer, name)
            larger = buffer.new_zeros(*buffer.shape[:2], columns.size, buffer.shape[3])
            larger[:, :, : buffer.shape[2]] = buffer
            setattr(layer, name, larger)

    def _move(self, by: int) -> None:
        """Move all sequences by so many columns, to the right if positive; the columns are there."""
        columns = self.columns
        old = slice(columns.first, columns.now)
        new = slice(old.start + by, old.stop + by)
        for layer, name in self._buffers():
            buffer = getattr(layer, name)
            buffer[: self.rows, :, new] = buffer[: self.rows, :, old].clone()
        columns.go_to(columns.now + by)
        columns.starts = [start + by for start in columns.starts]
