"""How the next token is drawn from scores, and where the chance in it comes from.

The only source of chance of a request is a row of uniform numbers that hangs on its seed alone; a token is drawn by
turning one of them through the inverse cumulative distribution. So a text does not depend on the requests beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from isoray.config.base import Config
from isoray.generation.contrast import Gamma

COLDEST = 1e-20
"""Temperatures above 0 count as no lower, so that scores stay finite in float32."""


class SamplingConfig(Config):
    """How a text is drawn."""

    max_tokens: int = Field(default=256, ge=1)
    """At most so many new tokens; a text also ends where the model's context does."""
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Scores are divided by it before a token is drawn. 0: the best token is taken."""
    top_k: int = Field(default=0, ge=0)
    """Only so many of the best tokens may be drawn, and what equals the last of them. 0: all. (Transformers' own
    default, and so that of UniDetox's published code, is 50.)"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the best tokens that together reach this probability may be drawn, and what equals the last of them."""
    eos: Literal["stop", "ignore", "forbid"] = "stop"
    """The end-of-text token ends the text; is drawn like any other (`ignore`); or has no probability (`forbid`)."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these strings that it contains. (With beams it is cut there once it is
    finished.)"""
    beams: int = Field(default=1, ge=1)
    """Above 1: this many beams, of which the best is the text. With a temperature of 0 beam search, else beam sampling
    (CGE): twice as many candidates are drawn from the softmax of the beams' cumulative scores, the best go on."""
    length_penalty: float = Field(default=0.0, allow_inf_nan=False)
    """Finished beams compare by score / length^length_penalty. 0: by the cumulative score itself."""
    alpha: float | None = Field(default=None, ge=0, le=1)
    """In place of the contrast's own."""
    gamma: Gamma | None = None
    """In place of the contrast's own."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.beams > 1 and (self.top_k or self.top_p < 1):
            raise ValueError(
                "`top_k` and `top_p` are for texts that are drawn token by token: leave out them or `beams`"
            )
        return self


def seed_of(seed: int, index: int) -> int:
    """The seed of request number ``index`` of a batch with ``seed``: below 2^63, another for every pair."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8]) >> 1


def uniforms(seed: int, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1), float64, a function of ``seed`` (modulo 2^64) alone; fewer are the first of more."""
    return np.random.Generator(np.random.Philox(seed % 2**64)).random(count)


def draw(scores_BV: Tensor, uniform_B: Tensor, params: Sequence[SamplingConfig]) -> Tensor:
    """A token for each row [B] (int64): drawn with ``uniform_B`` (float64), or the best where the temperature is 0.

    ``scores_BV`` (float32) may hold -inf, but not only. A row's token does not depend on the other rows.
    """
    chance = [row for row, one in enumerate(params) if one.temperature > 0]
    if not chance:
        return scores_BV.argmax(-1)
    if len(chance) == len(params):
        return _draw(scores_BV, uniform_B, params)
    tokens_B = scores_BV.argmax(-1)
    tokens_B[chance] = _draw(scores_BV[chance], uniform_B[chance], [params[row] for row in chance])
    return tokens_B


def draw_several(scores_N: Tensor, uniforms_K: np.ndarray) -> Tensor:
    """K different indices into ``scores_N``, drawn one after the other from its softmax without putting back.

    Fewer where fewer than K scores are finite.
    """
    possible_F = scores_N.isfinite().nonzero().squeeze(1)
    probabilities_F = torch.softmax(scores_N[possible_F].double(), dim=-1).cpu().numpy()
    drawn: list[int] = []
    for uniform in uniforms_K[: len(possible_F)].tolist():
        cumulative_F = probabilities_F.cumsum()
        if not cumulative_F[-1] > 0:
            break
        index = int(cumulative_F.searchsorted(cumulative_F[-1] * uniform, side="right"))
        drawn.append(index)
        probabilities_F[index] = 0
    return possible_F[drawn]


def _draw(scores_BV: Tensor, uniform_B: Tensor, params: Sequence[SamplingConfig]) -> Tensor:
    if any(one.temperature != 1 for one in params):
        scores_BV = scores_BV / scores_BV.new_tensor([[max(one.temperature, COLDEST)] for one in params])
    cut = [row for row, one in enumerate(params) if one.top_k or one.top_p < 1]
    if len(cut) == len(params):
        scores_BV = _cut(scores_BV, params)
    elif cut:
        scores_BV = scores_BV.clone()
        scores_BV[cut] = _cut(scores_BV[cut], [params[row] for row in cut])
    cumulative_BV = torch.softmax(scores_BV, dim=-1).cumsum(-1, dtype=torch.float64)
    target_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1)


def _cut(scores_BV: Tensor, params: Sequence[SamplingConfig]) -> Tensor:
    """``scores_BV`` with -inf where a token is none of the best.

    Scores equal to the last that is kept stay, too: which of them did would hang on how the other rows are cut.
    """
    possible = int(scores_BV.isfinite().sum(-1).max())
    kept = [min(one.top_k or possible, possible) for one in params]
    best_BK = scores_BV.topk(max(kept), dim=-1).values
    rank_K = torch.arange(max(kept), device=scores_BV.device)
    best_BK = best_BK.masked_fill(rank_K >= torch.tensor(kept, device=scores_BV.device)[:, None], -math.inf)
    probabilities_BK = torch.softmax(best_BK, dim=-1)
    before_BK = probabilities_BK.cumsum(-1, dtype=torch.float64) - probabilities_BK
    # The token that reaches top_p stays in.
    past_BK = before_BK >= torch.tensor([[one.top_p] for one in params], device=scores_BV.device, dtype=torch.float64)
    past_BK |= best_BK == -math.inf
    lowest_B1 = best_BK.masked_fill(past_BK, math.inf).amin(-1, keepdim=True)
    return scores_BV.masked_fill(scores_BV < lowest_B1, -math.inf)
