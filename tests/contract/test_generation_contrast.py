"""What contrasts draw: the distributions of the papers, and the published mistake of a shared cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from generating import (
    CONTEXT,
    PAIR,
    TOKENS,
    assert_as_slow,
    engine_of,
    log_softmax,
    logits_after,
    mixed,
    slow_draw,
    slow_scores,
    slow_text,
    some_prompts,
    tiny,
)
from scipy import stats
from transformers.cache_utils import DynamicCache

from isoray.errors import UserError
from isoray.generation.contrast import ContrastConfig
from isoray.generation.sampling import SamplingConfig, seed_of, uniforms

MODELS = tiny(0), tiny(1)
PROMPT = (10, 200, 37, 4)
DRAWS = 3000


pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(contrast: ContrastConfig, models: Sequence[torch.nn.Module], sampling: SamplingConfig) -> np.ndarray:
    """How often each token came after PROMPT."""
    with engine_of(*models, contrast=contrast, slots=500) as engine:  # type: ignore[arg-type]
        answers = engine.generate([PROMPT] * DRAWS, sampling.model_copy(update={"max_tokens": 1}))
    return np.bincount([one.token_ids[0] for one in answers], minlength=TOKENS)


def assert_drawn_from(seen: np.ndarray, probabilities: np.ndarray) -> None:
    """Chi-square; tokens that hardly come are counted together."""
    expected = probabilities / probabilities.sum() * seen.sum()
    assert seen[expected == 0].sum() == 0
    usual = expected >= 5
    seen_of = [*seen[usual], seen[~usual].sum()]
    expected_of = [*expected[usual], expected[~usual].sum()]
    if expected_of[-1] == 0:
        seen_of, expected_of = seen_of[:-1], expected_of[:-1]
    assert stats.chisquare(seen_of, expected_of).pvalue > 1e-3


def test_equal_models_draw_uniformly_from_the_plausible_tokens() -> None:
    """UniDetox 2.8.1, CGE 3.8.2."""
    probabilities = np.exp(log_softmax(logits_after(MODELS[0], PROMPT)))
    plausible = probabilities >= 0.1 * probabilities.max()
    assert 3 <= plausible.sum() < 100
    assert_drawn_from(drawn(PAIR, [MODELS[0], tiny(0)], SamplingConfig()), plausible.astype(float))


def test_gamma_0_and_alpha_0_draw_from_the_positive_model() -> None:
    probabilities = np.exp(log_softmax(logits_after(MODELS[0], PROMPT)))
    assert_drawn_from(drawn(PAIR, MODELS, SamplingConfig(gamma=0, alpha=0)), probabilities)
    assert_drawn_from(drawn(ContrastConfig(positive="p"), MODELS[:1], SamplingConfig()), probabilities)


def test_a_ratio_draws_from_the_quotient_on_the_plausible_tokens() -> None:
    positive, negative = (np.exp(log_softmax(logits_after(model, PROMPT))) for model in MODELS)
    quotient = np.where(positive >= 0.1 * positive.max(), positive / negative, 0)
    assert_drawn_from(drawn(PAIR, MODELS, SamplingConfig()), quotient)
    assert_drawn_from(drawn(PAIR, MODELS, SamplingConfig(gamma=math.inf)), quotient)


def test_temperature_and_cuts_apply_to_the_contrast() -> None:
    scores = slow_scores([logits_after(model, PROMPT) for model in MODELS], "ratio", 1.0, 0.01)
    warm = np.exp(log_softmax(scores / 2))
    assert_drawn_from(drawn(PAIR, MODELS, SamplingConfig(alpha=0.01, temperature=2)), warm)
    best = np.argsort(-scores)[:5]
    kept = np.zeros(TOKENS)
    kept[best] = warm[best]
    assert_drawn_from(drawn(PAIR, MODELS, SamplingConfig(alpha=0.01, temperature=2, top_k=5)), kept)


def test_alpha_1_is_greedy_decoding_of_the_positive_model() -> None:
    """UniDetox 2.8.2."""
    greedy = SamplingConfig(temperature=0, max_tokens=20)
    prompts = some_prompts(5)
    with engine_of(*MODELS) as engine, engine_of(MODELS[0]) as alone:
        want = [one.token_ids for one in alone.generate(prompts, greedy)]
        got = engine.generate(prompts, SamplingConfig(alpha=1, max_tokens=20))
    assert [one.token_ids for one in got] == want


def test_equal_experts_leave_the_base() -> None:
    contrast = ContrastConfig(positive="p", negative="n", base="b", gamma=3.0, alpha=0)
    prompts = some_prompts(5)
    with engine_of(MODELS[0], MODELS[1], tiny(1), contrast=contrast) as engine, engine_of(MODELS[0]) as base:
        for one, other in zip(engine.generate(prompts), base.generate(prompts), strict=True):
            assert one.token_ids == other.token_ids
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def shared_cache_text(prompt: Sequence[int], sampling: SamplingConfig, seed: int) -> list[int]:
    """UniDetox's published code: after the first token the negative model is handed the positive's keys and values."""
    positive, negative = MODELS
    ids, chance = list(prompt), uniforms(seed, sampling.max_tokens)
    cache, length = DynamicCache(), len(prompt)
    with torch.no_grad():
        first = positive(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
    logits = [first.numpy(), logits_after(negative, ids)]
    while True:
        ids.append(slow_draw(slow_scores(logits, "ratio", 1.0, 0.1), chance[len(ids) - len(prompt)], sampling))
        if len(ids) == len(prompt) + sampling.max_tokens:
            return ids[len(prompt) :]
        token = torch.tensor([ids[-1:]])
        with torch.no_grad():
            other = negative(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1]
            cache.crop(-1)
            assert cache.get_seq_length() == length
            ours = positive(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1]
        length += 1
        logits = [ours.numpy(), other.numpy()]


@pytest.mark.parametrize("static", [False, True])
def test_the_published_fault_can_be_had(static: bool) -> None:
    prompts, sampling = some_prompts(8, longest=20), SamplingConfig(max_tokens=20, eos="ignore")
    with engine_of(*MODELS, slots=3, cache="shared", static_cache=static) as engine:
        shared = engine.generate(prompts, sampling)
    with engine_of(*MODELS, slots=3, static_cache=static) as engine:
        assert_as_slow(engine, MODELS, prompts, [sampling] * 8, seed=0)
        separate = engine.generate(prompts, sampling)
    for index, (one, other) in enumerate(zip(shared, separate, strict=True)):
        assert list(one.token_ids) == shared_cache_text(prompts[index], sampling, seed_of(0, index))
        assert one.token_ids[0] == other.token_ids[0], "the first token has no past"
    assert all(one.token_ids != other.token_ids for one, other in zip(shared, separate, strict=True))


def test_models_of_different_shapes_share_no_cache() -> None:
    small = tiny(1, num_key_value_heads=1)
    with engine_of(MODELS[0], small, slots=4) as engine:
        assert_as_slow(engine, [MODELS[0], small], some_prompts(5), mixed(5))
    with pytest.raises(UserError, match="share a cache"):
        engine_of(MODELS[0], small, cache="shared")


def test_padded_vocabularies_of_different_size() -> None:
    models = [tiny(0, vocab_size=TOKENS + 6), tiny(1, vocab_size=TOKENS + 20)]
    with torch.no_grad():
        for model in models:
            model.lm_head.weight[TOKENS:] = 50 * model.lm_head.weight[:1]  # were they counted, one would see it
    prompts = some_prompts(6)
    with engine_of(*models, slots=3) as engine:
        assert engine.vocabulary == TOKENS
        assert_as_slow(engine, models, prompts, mixed(6))


def test_new_texts_after_old_ones_are_not_longer_than_the_context() -> None:
    with engine_of(*MODELS, slots=2) as engine:
        for _ in range(3):
            answers = engine.generate(some_prompts(4), SamplingConfig(max_tokens=CONTEXT, eos="ignore"))
            assert all(one.prompt_tokens + len(one.token_ids) == CONTEXT for one in answers)


def test_raw_scores_are_not_normalised() -> None:
    raw = ContrastConfig(positive="p", negative="n", normalise=False)
    with engine_of(*MODELS, contrast=raw) as engine, engine_of(*MODELS) as other:
        (one,), (normal,) = engine.generate([PROMPT]), other.generate([PROMPT])
    tokens, scores = slow_text(MODELS, PROMPT, SamplingConfig(), seed_of(0, 0), raw)
    assert one.token_ids == normal.token_ids == tuple(tokens)
    assert one.log_probs == pytest.approx(scores, abs=1e-4)
    assert one.log_probs != normal.log_probs
