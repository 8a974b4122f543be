"""The contrast of models' next-token distributions: one operator behind four methods.

A *contrast* weighs the log-probabilities of two or three models for the same prefix and leaves out what the first of
them finds implausible::

    score(v) = sum over models of weight * log p_model(v)      where p_first(v) >= alpha * max p_first, else -inf

- UniDetox (Lu et al., 2025, section 3): base minus toxic model, alpha 0.1, pure ratio.
- Contrastive Generative Exploration (Isonuma and Titov, 2025, section 3): fine-tuned minus gamma x pre-trained model.
- CoDIT: post-trained minus beta x base model, alpha 0.01; the plausibility cut is that of contrastive decoding (Li et
  al., 2023, equation 2).
- DExperts (Liu et al., 2021, equation 1): base + gamma x (expert - anti-expert).

Everything here is arithmetic on tensors; what runs the models are the engines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import AfterValidator, Field, PlainSerializer, model_validator
from torch import Tensor

from isoray.config.base import Config

Role = Literal["base", "positive", "negative"]
Form = Literal["ratio", "extrapolation", "experts"]

LOWEST = -1e4
"""Log-probabilities count as no lower than this, so that two models that both exclude a token do not make a NaN."""
LARGEST = 1e6
"""No finite weight of a model is larger: float32 could not hold the scores."""


def _check_gamma(gamma: float) -> float:
    if LARGEST < gamma < math.inf:
        raise ValueError(f"gamma is {gamma:g}; give at most {LARGEST:g}, or .inf for the pure ratio")
    return gamma


Gamma = Annotated[
    float,
    Field(ge=0),
    AfterValidator(_check_gamma),
    PlainSerializer(lambda gamma: gamma if math.isfinite(gamma) else "inf", when_used="json"),  # JSON has no infinity
]
"""The type of a weight of the negative model: a number from 0 on, or infinity."""


class ContrastConfig(Config):
    """Which models are contrasted, and how."""

    positive: str
    """The model whose distribution is raised: a Transformers folder, a LoRA adapter's folder, a .gguf file or a hub id.
    UniDetox: the base model; CGE: the fine-tuned one; CoDIT: the post-trained one; DExperts: the expert."""
    negative: str | None = None
    """The model whose distribution is lowered. An adapter on the positive model's folder shares its weights. null:
    there is no contrast; the positive model generates alone, and `alpha` and `gamma` say nothing."""
    base: str | None = None
    """The model that expert and anti-expert steer (DExperts); its presence makes the form `experts`."""
    form: Form | None = None
    """`ratio`: log p+ - gamma log p- (CGE, CoDIT). `extrapolation`: (1 + gamma) log p+ - gamma log p- (UniDetox's
    general form). `experts`: log p + gamma (log p+ - log p-) (DExperts). Default: `experts` where there is a base, else
    `ratio`."""
    alpha: float = Field(default=0.1, ge=0, le=1)
    """Tokens below this share of the largest probability are left out, by the first model: the base where there is one,
    else the positive one. 0: none is; 1: only the most probable one stays."""
    gamma: Gamma = 1.0
    """Weight of the negative model (see `form`); `.inf`: the pure ratio log p+ - log p-, UniDetox's "beta =
    infinity"."""
    normalise: bool = True
    """Whether log-probabilities and beams are made of the contrast after it was normalised over the vocabulary; false:
    of raw scores (CGE). Which token is drawn next, without beams, is the same."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.base is not None and self.negative is None:
            raise ValueError("`base` is steered by an expert (`positive`) and an anti-expert (`negative`): give both")
        if self.form is not None and (self.form == "experts") != (self.base is not None):
            raise ValueError(
                "`form: experts` needs `base`, the model that is steered; with a `base` there is no other form"
            )
        return self

    @property
    def models(self) -> dict[Role, str]:
        """The models by role, the one that decides what is plausible first."""
        named: dict[Role, str | None] = {"base": self.base, "positive": self.positive, "negative": self.negative}
        return {role: path for role, path in named.items() if path is not None}

    @property
    def resolved_form(self) -> Form:
        """`form`, or what its default stands for."""
        return self.form or ("ratio" if self.base is None else "experts")


def weights(form: Form, gamma: float) -> tuple[float, ...]:
    """What each model's log-probability is multiplied by, in the order of :attr:`ContrastConfig.models`."""
    if form == "experts":
        return (0.0, 1.0, -1.0) if math.isinf(gamma) else (1.0, gamma, -gamma)
    if math.isinf(gamma):
        return (1.0, -1.0)
    return (1.0, -gamma) if form == "ratio" else (1.0 + gamma, -gamma)


class Fused(NamedTuple):
    """Scores of the next token."""

    scores_BV: Tensor
    """float32; raw (not normalised), -inf where a token is left out."""
    broken_B: Tensor
    """bool: some model gave a number that is none for this row; its scores mean nothing."""


def fuse(logits: Sequence[Tensor], weights_MB: Tensor, alpha_B: Tensor, forbidden_BV: Tensor | None = None) -> Fused:
    """The contrast of M models' logits [B, V] (any float dtype, one vocabulary), the deciding model first.

    ``weights_MB`` (float32) are those of :func:`weights` for each row, ``alpha_B`` (float32) its plausibility.
    ``forbidden_BV`` (bool) tells tokens that cannot come: all distributions are those given that they do not.
    Log-probabilities are taken in float32.
    """
    log_probs = []
    for logits_BV in logits:
        scores_BV = logits_BV.float().contiguous()  # a softmax over strided memory is slow
        if forbidden_BV is not None:
            scores_BV = scores_BV.masked_fill(forbidden_BV, -math.inf)
        log_probs.append(torch.log_softmax(scores_BV, dim=-1))
    first_BV = log_probs[0]
    threshold_B = first_BV.amax(-1) + alpha_B.log()
    plausible_BV = first_BV >= threshold_B.clamp_min(torch.finfo(torch.float32).min)[:, None]
    if len(log_probs) == 1:
        fused_BV = first_BV
        broken_B = first_BV.amax(-1).isnan()
    else:
        fused_BV = sum_of(log_probs, weights_MB)
        broken_B = ~fused_BV.sum(-1).isfinite()
    return Fused(fused_BV.masked_fill(~plausible_BV, -math.inf), broken_B)


def sum_of(log_probs: Sequence[Tensor], weights_MB: Tensor) -> Tensor:
    """The weighed sum of M models' log-probabilities [B, V]."""
    total = torch.zeros_like(log_probs[0])
    for log_probs_BV, weight_B in zip(log_probs, weights_MB, strict=True):
        total.addcmul_(log_probs_BV.clamp_min(LOWEST), weight_B[:, None])
    return total


def raw_score(log_probs: Mapping[Role, Sequence[float]], form: Form, gamma: float) -> list[float]:
    """The contrast at given tokens, from each model's log-probabilities of them; nothing is left out or normalised."""
    factors = weights(form, gamma) if len(log_probs) > 1 else (1.0,)
    columns = zip(*log_probs.values(), strict=True)
    return [sum(f * max(value, LOWEST) for f, value in zip(factors, column, strict=True)) for column in columns]
