"""Rows of keys and values stay what they are while others come, grow, move and go."""

from __future__ import annotations

import random

import pytest
import torch
from transformers.cache_utils import DynamicCache

from isoray.generation.cache import ROOM, Slots

SLOTS, LAYERS, ROLES = 5, 2, ("positive", "negative")


class Ledger:
    """Slots with texts of numbers in them; keys and values of every token are its number, by layer and model."""

    def __init__(self, fixed: int | None = None) -> None:
        self.slots = Slots(SLOTS, torch.device("cpu"), fixed=fixed)
        self.texts: list[list[float]] = []
        self.next = 1.0

    def number(self) -> float:
        self.next += 1
        return self.next

    def append(self, lengths: list[int], copies: list[int]) -> None:
        texts = [[self.number() for _ in range(length)] for length in lengths]
        width = max(lengths)
        prefilled = {}
        for offset, role in enumerate(ROLES):
            cache = DynamicCache()
            rows = torch.tensor([[-7.0] * (width - len(text)) + text for text in texts]) + 1000 * offset
            states = rows[:, None, :, None].expand(-1, 2, -1, 3)
            for layer in range(LAYERS):
                cache.update(states + layer / 4, -states - layer / 4, layer)
            prefilled[role] = cache
        self.slots.append(prefilled, lengths, copies)
        self.texts += [list(text) for text, count in zip(texts, copies, strict=True) for _ in range(count)]

    def step(self) -> None:
        tokens = [self.number() for _ in self.texts]
        for offset, role in enumerate(ROLES):
            idle = [-9.0] * (self.slots.columns.active - len(tokens))
            states = (torch.tensor(tokens + idle) + 1000 * offset)[:, None, None, None].expand(-1, 2, 1, 3)
            for layer in range(LAYERS):
                keys, values = self.slots.caches[role].update(states + layer / 4, -states - layer / 4, layer)
                self.check(keys, tokens, offset, layer)
                self.check(-values, tokens, offset, layer)
        for text, token in zip(self.texts, tokens, strict=True):
            text.append(token)
        self.slots.advance()

    def check(self, states: torch.Tensor, tokens: list[float], offset: int, layer: int) -> None:
        """What attention may look at is each row's text, and its new token."""
        mask = self.slots.columns.mask()
        assert states.shape[0] == self.slots.columns.active
        assert states.isfinite().all()
        for row, text in enumerate(self.texts):
            seen = states[row] if mask is None else states[row][:, mask.reshape(states.shape[0], -1)[row]]
            want = torch.tensor([*text, tokens[row]]) + 1000 * offset + layer / 4
            assert torch.equal(seen, want[None, :, None].expand(2, -1, 3))

    def remove(self, rows: list[int]) -> None:
        moved = self.slots.remove(rows)
        kept = {row: text for row, text in enumerate(self.texts) if row not in rows}
        self.texts = [text for _, text in sorted((moved.get(row, row), text) for row, text in kept.items())]
        assert sorted(moved.get(row, row) for row in kept) == list(range(len(kept)))


@pytest.mark.parametrize("fixed", [None, 70])
@pytest.mark.parametrize("seed", range(4))
def test_texts_stay_whole_whatever_happens(seed: int, fixed: int | None) -> None:
    random.seed(seed)
    ledger, longest = Ledger(fixed), 50
    refilled = 0
    for _ in range(400):
        ledger.remove([row for row, text in enumerate(ledger.texts) if len(text) == longest])
        act = random.random()
        free = SLOTS - len(ledger.texts)
        if free and (act < 0.15 or not ledger.texts):
            copies = [random.choice([1, 1, min(3, free)])]
            if sum(copies) < free:
                copies.append(1)
            ledger.append([random.choice([1, 3, 9, 30]) for _ in copies], copies)
            refilled += 1
        elif act < 0.2:
            ledger.remove(random.sample(range(len(ledger.texts)), random.randint(1, len(ledger.texts))))
        elif act < 0.25:
            parents = {row: random.randrange(len(ledger.texts)) for row in range(len(ledger.texts))}
            ledger.slots.reorder(parents)
            ledger.texts = [list(ledger.texts[parents[row]]) for row in range(len(ledger.texts))]
        else:
            positions = ledger.slots.columns.positions()[: len(ledger.texts), 0].tolist()
            assert positions == [len(text) for text in ledger.texts]
            ledger.step()
    assert refilled > 20


def test_equal_rows_need_no_mask() -> None:
    ledger = Ledger()
    ledger.append([4, 4], [1, 1])
    assert ledger.slots.columns.mask() is None
    ledger.append([2], [1])
    assert ledger.slots.columns.mask().tolist() == [[True] * 5, [True] * 5, [False, False, True, True, True]]


def test_the_buffers_hold_what_is_in_use_not_all_that_ever_was() -> None:
    """Texts that come and go for long do not make the cache longer and longer."""
    ledger = Ledger()
    for _ in range(60):
        ledger.append([5], [1])
        for _ in range(10):
            ledger.step()
        if len(ledger.texts) == SLOTS:
            ledger.remove([min(range(SLOTS), key=lambda row: -len(ledger.texts[row]))])
    assert ledger.next > 60 * 15
    assert ledger.slots.columns.size <= 3 * (SLOTS * 10 + ROOM)


def test_a_row_with_numbers_that_are_none_leaves_nothing_behind() -> None:
    ledger = Ledger()
    ledger.append([3, 6], [1, 1])
    for layer in ledger.slots.caches["positive"].layers:
        layer.keys[0] = torch.nan
        layer.values[0] = torch.nan
    ledger.slots.wipe([0])
    for layer in ledger.slots.caches["positive"].layers:
        assert layer.keys.isfinite().all() and layer.values.isfinite().all()
    ledger.remove([0])
    ledger.append([1], [1])
    ledger.append([8], [1])  # the view now begins before the others do
    ledger.step()
