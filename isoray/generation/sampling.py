"""How the next token is drawn from scores, and where the chance in it comes from.

The only source of chance of a request is a row of uniform numbers that hangs on its seed alone; a token is drawn by
turning one of them through the inverse cumulative distribution. So a text does not depend on the requests beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from isoray.config.base import Config


class SamplingConfig(Config):
    """How a text is drawn."""

    max_tokens: int = Field(default=256, ge=1)
    """At most so many new tokens; a text also ends where the model's context does."""
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Scores are divided by it before a token is drawn. 0: the best token is taken."""
    top_k: int = Field(default=0, ge=0)
    """Only so many of the best tokens may be drawn. 0: all. (Transformers' own default, and so that of UniDetox's
    published code, is 50.)"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the best tokens that together reach this probability may be drawn."""
    eos: Literal["stop", "ignore", "forbid"] = "stop"
    """The end-of-text token ends the text; is drawn like any other (`ignore`); or has no probability (`forbid`)."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these strings that it contains."""
    beams: int = Field(default=1, ge=1)
    """Above 1: this many beams, of which the best is the text. With a temperature of 0 beam search, else beam sampling
    (CGE): twice as many candidates are drawn from the softmax of the beams' cumulative scores, the best go on."""
    length_penalty: float = Field(default=0.0, allow_inf_nan=False)
    """Finished beams compare by score / length^length_penalty. 0: by the cumulative score itself."""
    alpha: float | None = Field(default=None, ge=0, le=1)
    """In place of the contrast's own."""
    gamma: float | None = Field(default=None, ge=0)
    """In place of the contrast's own."""


def seed_of(seed: int, index: int) -> int:
    """The seed of request number ``index`` of a batch with ``seed``: below 2^63, another for every pair."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8]) >> 1


def uniforms(seed: int, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1), float64, a function of ``seed`` alone."""
    return np.random.Generator(np.random.Philox(seed)).random(count)


def draw(scores_BV: Tensor, uniform_B: Tensor, params: Sequence[SamplingConfig]) -> Tensor:
    """A token for each row [B] (int64): drawn with ``uniform_B`` (float64), or the best where the temperature is 0.

    ``scores_BV`` (float32) may hold -inf, but not only. A row's token does not depend on the other rows.
    """
    tokens_B = scores_BV.argmax(-1)
    plain = [row for row, one in enumerate(params) if one.temperature > 0 and not _cut(one)]
    cut = [row for row, one in enumerate(params) if one.temperature > 0 and _cut(one)]
    for rows, pick in ((plain, _inverse), (cut, _inverse_of_cut)):
        if rows:
            every = len(rows) == len(params)
            chosen = [params[row] for row in rows]
            temperature_B = scores_BV.new_tensor([one.temperature for one in chosen])
            scores_RV = (scores_BV if every else scores_BV[rows]) / temperature_B[:, None]
            tokens_B[rows] = pick(scores_RV, uniform_B if every else uniform_B[rows], chosen)
    return tokens_B


def draw_several(scores_N: Tensor, uniforms_K: np.ndarray) -> Tensor:
    """K different indices into ``scores_N``, drawn one after the other from its softmax without putting back.

    Fewer where fewer than K scores are finite.
    """
    probabilities_N = torch.softmax(scores_N.double(), dim=-1)
    drawn: list[int] = []
    for uniform in uniforms_K.tolist():
        cumulative_N = probabilities_N.cumsum(-1)
        total = cumulative_N[-1]
        if not total > 0:
            break
        index = int(torch.searchsorted(cumulative_N, total * uniform, right=True))
        drawn.append(index)
        probabilities_N[index] = 0
    return torch.tensor(drawn, dtype=torch.int64, device=scores_N.device)


def _cut(params: SamplingConfig) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _inverse(scores_BV: Tensor, uniform_B: Tensor, params: Sequence[SamplingConfig]) -> Tensor:
    cumulative_BV = torch.softmax(scores_BV, dim=-1).cumsum(-1, dtype=torch.float64)
    target_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1)


def _inverse_of_cut(scores_BV: Tensor, uniform_B: Tensor, params: Sequence[SamplingConfig]) -> Tensor:
    vocabulary = scores_BV.shape[1]
    finite = scores_BV.isfinite().sum(-1).tolist()
    kept = [min(one.top_k or vocabulary, count) for one, count in zip(params, finite, strict=True)]
    best_BK, tokens_BK = scores_BV.topk(max(kept), dim=-1)
    rank_K = torch.arange(max(kept), device=scores_BV.device)
    best_BK = best_BK.masked_fill(rank_K >= torch.tensor(kept, device=scores_BV.device)[:, None], -math.inf)
    probabilities_BK = torch.softmax(best_BK, dim=-1)
    before_BK = probabilities_BK.cumsum(-1) - probabilities_BK
    top_p_B = scores_BV.new_tensor([one.top_p for one in params])
    # The token that reaches top_p stays in.
    probabilities_BK = probabilities_BK.masked_fill(before_BK >= top_p_B[:, None], 0.0)
    cumulative_BK = probabilities_BK.cumsum(-1, dtype=torch.float64)
    target_B1 = (uniform_B * cumulative_BK[:, -1])[:, None]
    return tokens_BK.gather(1, torch.searchsorted(cumulative_BK, target_B1, right=True)).squeeze(1)
