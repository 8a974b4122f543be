"""Which blocks step k trains on: a pure function of (seed, k, data), so that resuming costs nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from isoray.config.base import digest_of, nearest
from isoray.corpora.store import Block, Blocks, Int32Array
from isoray.errors import DataError, UserError

MIXTURE, REPLACEMENT, POISSON = 0, 1, 2
"""What random numbers are drawn for."""


class BlockRef(NamedTuple):
    """Where a block lies: store number and index in it."""

    store: int
    index: int  # type: ignore[assignment]


class Stream(Protocol):
    """What training takes: the blocks of each step."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see as many blocks as there are."""

    def refs(self, step: int, /) -> list[BlockRef]:
        """The blocks of step ``step``, from 0."""

    def lengths(self, refs: Sequence[BlockRef], /) -> Int32Array:
        """int32 [len(refs)]: tokens in each."""

    def load(self, refs: Sequence[BlockRef], /) -> list[Block]:
        """The blocks themselves."""


class BlockStream:
    """An endless stream of batches over the blocks of several stores.

    Shuffled (the default), the blocks of all stores are laid out in one seeded permutation per epoch, epoch after
    epoch, and step k takes the k-th ``batch_size`` of them. ``exclude`` names corpora to leave out *with common random
    numbers*: the batch at step k is that of the full mixture, in which only the excluded corpora's blocks are replaced,
    by blocks of the remaining corpora in a seeded order of their own. Two streams that differ in what they exclude thus
    agree wherever they can, which takes the sampling noise out of their difference (leave-one-out).

    Unshuffled, the remaining blocks come in order and the last batch of an epoch may be short.

    Raises UserError for a name in ``exclude`` that no store has, DataError when no block remains.
    """

    def __init__(
        self,
        stores: Sequence[Blocks],
        *,
        batch_size: int,
        seed: int,
        exclude: Collection[str] = (),
        shuffle: bool = True,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        names = [store.name for store in stores]
        for name in exclude:
            if name not in names:
                raise UserError(f"cannot leave out corpus {name!r}: {nearest(name, names)}")
        self.stores = list(stores)
        self.batch_size = batch_size
        self.seed = seed
        self.exclude = frozenset(exclude)
        self.shuffle = shuffle
        self._first = np.cumsum([0] + [len(store) for store in stores])
        excluded = np.repeat([name in self.exclude for name in names], np.diff(self._first))
        self._excluded: npt.NDArray[np.bool_] = excluded.astype(np.bool_)
        self._remaining = np.flatnonzero(~self._excluded)
        if not len(self._remaining):
            raise DataError(f"no blocks to train on: corpora {names or '(none)'} without {sorted(exclude)} are empty")
        self.steps_per_epoch = -(-len(self._remaining) // batch_size)
        """Steps that see as many blocks as there are outside the excluded corpora, rounded up."""
        self.fingerprint = digest_of(
            {
                "stores": [[store.name, store.digest] for store in stores],
                "batch_size": batch_size,
                "seed": seed,
                "exclude": sorted(exclude),
                "shuffle": shuffle,
            }
        )
        """Identifies the whole sequence of batches."""
        self._permutation = functools.lru_cache(maxsize=4)(self._permute)
        self._replaced_before = functools.lru_cache(maxsize=2)(self._count_replaced)

    def __reduce__(self) -> tuple[Any, ...]:
        build = functools.partial(BlockStream, seed=self.seed, exclude=self.exclude, shuffle=self.shuffle)
        return functools.partial(build, batch_size=self.batch_size), (self.stores,)

    def refs(self, step: int) -> list[BlockRef]:
        """The blocks of step ``step`` (counted from 0): a pure function of (seed, step, data)."""
        return [self._ref(index) for index in self._indices(step)]

    def lengths(self, refs: Sequence[BlockRef]) -> Int32Array:
        """int32 [len(refs)]: tokens in each block."""
        return np.array([self.stores[ref.store].lengths[ref.index] for ref in refs], np.int32)

    def load(self, refs: Sequence[BlockRef]) -> list[Block]:
        """The blocks themselves."""
        return [self.stores[ref.store][ref.index] for ref in refs]

    def _indices(self, step: int) -> list[int]:
        if step < 0:
            raise IndexError(f"step {step}: steps are counted from 0")
        if not self.shuffle:
            begin = step % self.steps_per_epoch * self.batch_size
            return [int(index) for index in self._remaining[begin : begin + self.batch_size]]
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._index_at(position) for position in positions]

    def _index_at(self, position: int) -> int:
        """The block at ``position`` of the endless shuffled sequence."""
        epoch, place = divmod(position, len(self._excluded))
        index = int(self._permutation(MIXTURE, epoch)[place])
        if not self._excluded[index]:
            return index
        replaced = epoch * (len(self._excluded) - len(self._remaining)) + int(self._replaced_before(epoch)[place])
        turn, place = divmod(replaced, len(self._remaining))
        return int(self._remaining[self._permutation(REPLACEMENT, turn)[place]])

    def _permute(self, purpose: int, epoch: int) -> npt.NDArray[np.int64]:
        count = len(self._excluded) if purpose == MIXTURE else len(self._remaining)
        return np.random.default_rng([self.seed, purpose, epoch]).permutation(count)

    def _count_replaced(self, epoch: int) -> npt.NDArray[np.int64]:
        excluded = self._excluded[self._permutation(MIXTURE, epoch)]
        return np.cumsum(excluded) - excluded

    def _ref(self, index: int) -> BlockRef:
        store = int(np.searchsorted(self._first, index, side="right")) - 1
        return BlockRef(store, index - int(self._first[store]))


class PoissonStream(BlockStream):
    """A stream whose steps draw every block by itself, with the chance ``batch_size / number of blocks``.

    Batches thus vary in size around ``batch_size`` and may be empty: the sampling that the guarantee of differentially
    private training assumes (Abadi et al., 2016). ``secure`` draws from the operating system's randomness, anew with
    every call, so that nobody who knows the seed knows the batches; these then hang on nothing that could be repeated.

    Raises UserError for more than all blocks per step, DataError when there is no block.
    """

    def __init__(self, stores: Sequence[Blocks], *, batch_size: int, seed: int, secure: bool = False) -> None:
        super().__init__(stores, batch_size=batch_size, seed=seed)
        self.examples = len(self._remaining)
        if batch_size > self.examples:
            raise UserError(
                f"batch_size is {batch_size}, but there are {self.examples} examples: with private training every "
                "example is drawn with the chance batch_size / examples, which must be at most 1"
            )
        self.secure = secure
        self.fingerprint = digest_of({"blocks": self.fingerprint, "sampling": "poisson", "secure": secure})

    def __reduce__(self) -> tuple[Any, ...]:
        build = functools.partial(PoissonStream, seed=self.seed, secure=self.secure)
        return functools.partial(build, batch_size=self.batch_size), (self.stores,)

    @property
    def rate(self) -> float:
        """The chance of each example to be in a step's batch."""
        return self.batch_size / self.examples

    def _indices(self, step: int) -> list[int]:
        if step < 0:
            raise IndexError(f"step {step}: steps are counted from 0")
        if self.secure:
            draws = np.frombuffer(os.urandom(8 * self.examples), np.uint64) / 2.0**64
        else:
            draws = np.random.default_rng([self.seed, POISSON, step]).random(self.examples)
        return [int(index) for index in np.flatnonzero(draws < self.rate)]
