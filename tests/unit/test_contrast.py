"""The contrast operator: against the papers' formulas, its special cases, its config."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from generating import slow_scores
from pydantic import ValidationError

from isoray.generation.contrast import ContrastConfig, Form, fuse, raw_score, weights
from isoray.generation.engine import TokenScores

ROWS, TOKENS = 5, 40


def logits_of(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(ROWS, TOKENS, generator=generator, dtype=torch.float64) for _ in range(count)]


def fused(logits: list[torch.Tensor], form: Form, gamma: float, alpha: float) -> torch.Tensor:
    weights_MB = torch.tensor([weights(form, gamma)] * ROWS).t()
    return fuse(logits, weights_MB, torch.full((ROWS,), alpha)).scores_BV


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 7.0, math.inf])
@pytest.mark.parametrize("form", ["ratio", "extrapolation", "experts"])
def test_scores_are_those_of_the_papers(form: Form, gamma: float, alpha: float) -> None:
    logits = logits_of(3 if form == "experts" else 2)
    got = fused(logits, form, gamma, alpha)
    for row in range(ROWS):
        want = slow_scores([values[row].numpy() for values in logits], form, gamma, alpha)
        np.testing.assert_array_equal(np.isfinite(got[row].numpy()), np.isfinite(want))
        np.testing.assert_allclose(got[row], want, rtol=1e-5, atol=1e-4)


def test_rows_have_weights_and_plausibility_of_their_own() -> None:
    logits = logits_of(2)
    gammas, alphas = [0.0, 0.5, 1.0, 2.0, math.inf], [0.0, 0.05, 0.1, 0.5, 1.0]
    weights_MB = torch.tensor([weights("ratio", gamma) for gamma in gammas]).t()
    together = fuse(logits, weights_MB, torch.tensor(alphas)).scores_BV
    for row, (gamma, alpha) in enumerate(zip(gammas, alphas, strict=True)):
        assert torch.equal(together[row], fused(logits, "ratio", gamma, alpha)[row])


def test_equal_models_are_uniform_over_the_plausible_tokens() -> None:
    logits = logits_of(1)[0]
    scores = fused([logits, logits.clone()], "ratio", 1.0, 0.1)
    probabilities = torch.softmax(logits, -1)
    plausible = probabilities >= 0.1 * probabilities.amax(-1, keepdim=True)
    assert 1 < int(plausible[0].sum()) < TOKENS
    want = plausible / plausible.sum(-1, keepdim=True)
    torch.testing.assert_close(torch.softmax(scores, -1).double(), want.double())


def test_alpha_1_keeps_the_most_probable_token_of_the_first_model() -> None:
    logits = logits_of(2)
    scores = fused(logits, "ratio", 1.0, 1.0)
    assert torch.equal(scores.isfinite().sum(-1), torch.ones(ROWS, dtype=torch.int64))
    assert torch.equal(scores.argmax(-1), logits[0].argmax(-1))


def test_gamma_0_is_the_first_model_and_equal_experts_are_the_base() -> None:
    base, expert = logits_of(2)
    want = torch.log_softmax(base.float(), -1)
    torch.testing.assert_close(fused([base, expert], "ratio", 0.0, 0.0), want)
    torch.testing.assert_close(fused([base, expert], "extrapolation", 0.0, 0.0), want)
    torch.testing.assert_close(fused([base, expert, expert], "experts", 3.0, 0.0), want, rtol=1e-5, atol=1e-5)


def test_the_softmax_of_a_ratio_is_the_normalised_quotient() -> None:
    base, toxic = logits_of(2)
    scores = fused([base, toxic], "extrapolation", math.inf, 0.1)
    quotient = torch.softmax(base, -1) / torch.softmax(toxic, -1)
    quotient = quotient.masked_fill(~scores.isfinite(), 0)
    torch.testing.assert_close(torch.softmax(scores, -1).double(), quotient / quotient.sum(-1, keepdim=True))


def test_one_model_alone() -> None:
    (logits,) = logits_of(1)
    found = fuse([logits], torch.ones(1, ROWS), torch.zeros(ROWS))
    torch.testing.assert_close(found.scores_BV, torch.log_softmax(logits.float(), -1))
    assert not found.broken_B.any()


def test_forbidden_tokens_take_no_probability() -> None:
    logits = logits_of(2)
    forbidden = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    forbidden[:3, 7] = True
    scores = fuse(logits, torch.tensor([[1.0], [-0.5]]), torch.full((ROWS,), 0.01), forbidden).scores_BV
    for row in range(ROWS):
        rows = [values[row].numpy() for values in logits]
        want = slow_scores(rows, "ratio", 0.5, 0.01, forbidden=[7] if row < 3 else [])
        np.testing.assert_allclose(scores[row], want, rtol=1e-5, atol=1e-4)
    alone = fuse(logits[:1], torch.ones(1, ROWS), torch.zeros(ROWS), forbidden).scores_BV
    torch.testing.assert_close(alone.exp().sum(-1), torch.ones(ROWS))


def test_tokens_that_a_model_excludes() -> None:
    """A masked vocabulary gives -inf: excluded by the first model it stays out, by the other it makes no NaN."""
    positive, negative = logits_of(2)
    positive[:, 0] = negative[:, 0] = positive[:, 1] = negative[:, 2] = -math.inf
    found = fuse([positive, negative], torch.tensor([[1.0], [-1.0]]), torch.zeros(ROWS))
    assert not found.broken_B.any()
    assert torch.equal(found.scores_BV[:, :2], torch.full((ROWS, 2), -math.inf))
    assert found.scores_BV[:, 2].isfinite().all()
    assert torch.equal(found.scores_BV.argmax(-1), torch.full((ROWS,), 2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("model", [0, 1])
def test_rows_with_numbers_that_are_none_are_told(model: int, value: float) -> None:
    logits = logits_of(2)
    logits[model][3, 5] = value
    assert fuse(logits, torch.tensor([[1.0], [-1.0]]), torch.zeros(ROWS)).broken_B.tolist() == [False] * 3 + [
        True,
        False,
    ]
    if model == 0:
        alone = fuse(logits[:1], torch.ones(1, ROWS), torch.zeros(ROWS))
        assert alone.broken_B.tolist() == [False] * 3 + [True, False]


def test_strided_and_low_precision_logits() -> None:
    logits = logits_of(2)
    want = fused([values.bfloat16().double() for values in logits], "ratio", 1.0, 0.1)
    strided = [values.bfloat16().t().contiguous().t() for values in logits]
    assert not strided[0].is_contiguous()
    assert torch.equal(fused(strided, "ratio", 1.0, 0.1), want)


def test_raw_scores_of_a_given_text() -> None:
    log_probs = {"positive": (-1.0, -2.0), "negative": (-3.0, -0.5)}
    assert raw_score(log_probs, "ratio", 2.0) == [5.0, -1.0]
    assert raw_score(log_probs, "extrapolation", 1.0) == [1.0, -3.5]
    assert raw_score(log_probs, "ratio", math.inf) == [2.0, -1.5]
    assert raw_score({"positive": (-1.0, -2.0)}, "ratio", 1.0) == [-1.0, -2.0]
    three = {"base": (-1.0,), "positive": (-2.0,), "negative": (-4.0,)}
    assert raw_score(three, "experts", 0.5) == [0.0]
    assert TokenScores((1, 2, 3), log_probs).contrast(ContrastConfig(positive="p", negative="n", gamma=2)) == [
        5.0,
        -1.0,
    ]


def test_models_stand_in_the_order_of_their_weights() -> None:
    assert list(ContrastConfig(positive="p", negative="n").models) == ["positive", "negative"]
    experts = ContrastConfig(positive="p", negative="n", base="b")
    assert list(experts.models) == ["base", "positive", "negative"]
    assert experts.resolved_form == "experts"
    assert ContrastConfig(positive="p").models == {"positive": "p"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gamma": math.nan}, "gamma"),
        ({"gamma": -1}, "gamma"),
        ({"gamma": 1e9}, r"give at most 1e\+06, or .inf"),
        ({"alpha": 1.5}, "alpha"),
        ({"base": "b", "negative": None}, "give both"),
        ({"form": "experts"}, "needs `base`"),
        ({"form": "ratio", "base": "b"}, "no other form"),
    ],
)
def test_what_a_contrast_cannot_be(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ContrastConfig.model_validate({"positive": "p", "negative": "n"} | given)


def test_the_pure_ratio_survives_json() -> None:
    config = ContrastConfig(positive="p", negative="n", gamma=math.inf)
    assert ContrastConfig.model_validate(config.model_dump(mode="json")) == config
    assert ContrastConfig.model_validate_json(config.model_dump_json()) == config
    assert config.model_dump()["gamma"] == math.inf
    assert "Infinity" not in str(config.model_dump(mode="json"))
    other = ContrastConfig(positive="p", negative="n", gamma=1.0)
    assert len({config.digest(), other.digest()}) == 2
