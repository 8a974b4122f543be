"""Runs the models of a contrast side by side over one set of rows, a text in each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from isoray.errors import UserError
from isoray.generation.cache import Slots
from isoray.generation.decoding import evaluating
from isoray.generation.members import Member
from isoray.models.structure import plain


class Runner:
    """The models with their caches. Rows in use are the first ones; a row's number changes when others end."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        slots: int,
        vocabulary: int,
        fixed: int | None = None,
        shared_cache: bool = False,
    ) -> None:
        """``fixed``: number of columns of caches whose shapes never change.

        ``shared_cache``: all models attend to the first one's keys and values (for texts that were computed before).
        """
        self.members = list(members)
        self.device = next(plain(self.members[0].model).parameters()).device
        self.vocabulary = vocabulary
        self.slots = Slots(slots, self.device, fixed=fixed)
        self.shared_cache = shared_cache

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> list[Tensor]:
        """Compute prompts and give each so many new rows, after those in use: each model's logits [prompts, V]."""
        ids_BT, mask_BT = padded(prompts, self.device, left=True)
        positions_BT = (mask_BT.long().cumsum(-1) - 1).clamp_min(0)
        mask = None if bool(mask_BT.all()) else mask_BT
        caches: dict[str, DynamicCache] = {}
        logits = []
        for member in self.members:
            # It keeps everything, also where attention looks at a window only: the mask sees to that.
            cache = DynamicCache()
            logits.append(member.forward(ids_BT, positions_BT, mask, cache, step=False)[:, : self.vocabulary])
            if not (self.shared_cache and caches):
                caches[member.role] = cache
        self.slots.append(caches, [len(prompt) for prompt in prompts], list(copies))
        return logits

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> list[Tensor]:
        """Give each row in use one more token: each model's logits [rows, V]."""
        columns = self.slots.columns
        idle = columns.active - len(tokens)
        ids_R1 = torch.tensor([*tokens, *[tokens[0]] * idle], device=self.device)[:, None]
        positions_R1, mask = columns.positions(), columns.mask()
        logits: list[Tensor] = []
        # The first model comes last: where all share its cache, its keys and values are the ones that stay.
        for member in reversed(self.members):
            cache = self.slots.caches[self.members[0].role if self.shared_cache else member.role]
            found_RV = member.forward(ids_R1, positions_R1, mask, cache, step=True)
            logits.insert(0, found_RV[: len(tokens), : self.vocabulary])
        self.slots.advance()
        return logits


def check_members(members: Sequence[Member], *, fixed: int | None, context: int, shared_cache: bool) -> None:
    """Raise UserError for a model that computes something else with our cache than without one.

    Tried once per architecture, with two texts of different lengths: a model may mix positions by other means than
    attention, or take no mask from outside.
    """
    shapes = {(str(type(plain(member.model))), *_cache_shape(member)) for member in members}
    if shared_cache and len(shapes) > 1:
        raise UserError("Models share a cache (`cache: shared`) only if they have the same layers and heads.")
    length = min(8, context)
    for member in {type(plain(member.model)): member for member in members}.values():
        if length < 4:
            continue
        runner = Runner([member], slots=3, vocabulary=member.vocabulary, fixed=fixed)
        texts = [[(3 + 5 * i) % member.vocabulary for i in range(size)] for size in (length, length - 1)]
        runner.start([text[:-2] for text in texts], [1, 1])
        for place in (-2, -1):
            (found_RV,) = runner.step([text[place] for text in texts])
        wanted_RV = torch.cat([_alone(member, text, runner.device) for text in texts])
        error, size = float((found_RV - wanted_RV).abs().max()), float(wanted_RV.abs().max())
        # Some attention takes its softmax in float32 whatever the model's type.
        rounding = max(torch.finfo(wanted_RV.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
        if math.isfinite(size) and not error <= size * rounding:
            raise UserError(
                f"The {member.role} model ({member.config.model_type}) computes other things for a batch of texts than "
                "for each alone, so the Transformers engine cannot serve it"
                f"{' with `static_cache`' if fixed else ''}; use the vLLM engine."
            )


def _cache_shape(member: Member) -> list[int | None]:
    keys = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    return [getattr(member.config, key, None) for key in keys]


@torch.no_grad()
def _alone(member: Member, text: Sequence[int], device: torch.device) -> Tensor:
    model: Any = plain(member.model)
    with evaluating(model.modules()):
        logits_BTV: Tensor = model(input_ids=torch.tensor([text], device=device), use_cache=False).logits
    return logits_BTV[:, -1]


def padded(texts: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] (int64) and the mask of what is no padding [B, T] (bool).

    A row is padded with its own first token: one that makes a model give no numbers does so for its own text only.
    """
    length = max(map(len, texts))
    ids_BT = torch.tensor([[text[0]] * length for text in texts])
    mask_BT = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        span = slice(length - len(text), length) if left else slice(0, len(text))
        ids_BT[row, span] = torch.tensor(text)
        mask_BT[row, span] = True
    return ids_BT.to(device), mask_BT.to(device)


def by_tokens(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Where to cut texts of these lengths, in order, into batches of ``most`` tokens with padding, but one text."""
    begin = longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > begin and longest * (index - begin + 1) > most:
            yield slice(begin, index)
            begin, longest = index, length
    if begin < len(lengths):
        yield slice(begin, len(lengths))
