"""Beam search and beam sampling, against Transformers and against slow beams that are lists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from generating import (
    CONTEXT,
    PAIR,
    TOKENS,
    engine_of,
    log_softmax,
    logits_after,
    slow_scores,
    slow_text,
    some_prompts,
    tiny,
)
from scipy import stats
from toy_tokenizer import EOS

from isoray.generation.contrast import ContrastConfig
from isoray.generation.engine import Completion
from isoray.generation.sampling import SamplingConfig, seed_of, uniforms

MODELS = tiny(0), tiny(1)
RAW = ContrastConfig(positive="p", negative="n", normalise=False)
ALONE = ContrastConfig(positive="p")
Beam = tuple[list[int], float]


pytestmark = pytest.mark.usefixtures("one_thread")


def ending_often() -> torch.nn.Module:
    """A model for which the end of text is among the best tokens every now and then."""
    model = tiny(2)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2
    return model


def next_scores(models: Sequence[torch.nn.Module], ids: Sequence[int], contrast: ContrastConfig) -> np.ndarray:
    scores = slow_scores(
        [logits_after(model, ids) for model in models], contrast.resolved_form, contrast.gamma, contrast.alpha
    )
    return log_softmax(scores) if contrast.normalise else scores


def without_putting_back(probabilities: np.ndarray, chance: Sequence[float]) -> list[int]:
    left, found = probabilities.copy(), []
    for uniform in chance:
        if left.sum() == 0:
            break
        cumulative = left.cumsum()
        found.append(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")))
        left[found[-1]] = 0
    return found


def slow_beams(
    models: Sequence[torch.nn.Module],
    prompt: Sequence[int],
    sampling: SamplingConfig,
    contrast: ContrastConfig,
    chance: np.ndarray | None,
) -> list[int]:
    """The new tokens of the best beam. ``chance`` (for each step twice as many numbers as beams): beam sampling."""
    width = sampling.beams
    beams: list[Beam] = [([], 0.0)] * (width if chance is not None else 1)
    finished: list[Beam] = []
    for step in range(min(sampling.max_tokens, CONTEXT - len(prompt))):
        candidates: list[Beam] = []
        for tokens, total in beams:
            scores = next_scores(models, [*prompt, *tokens], contrast)
            candidates += [([*tokens, token], total + score) for token, score in enumerate(scores)]
        totals = np.array([total for _, total in candidates])
        if chance is None:
            chosen = np.argsort(-totals, kind="stable")[: 2 * width].tolist()
        else:
            probabilities = np.exp(log_softmax(totals / sampling.temperature))
            chosen = without_putting_back(probabilities, chance[step * 2 * width : (step + 1) * 2 * width])
        best = sorted((candidates[index] for index in chosen if totals[index] > -np.inf), key=lambda beam: -beam[1])
        ends = [sampling.eos == "stop" and beam[0][-1] == EOS for beam in best]
        finished += [beam for beam, end in list(zip(best, ends, strict=True))[:width] if end]
        beams = [beam for beam, end in zip(best, ends, strict=True) if not end][:width]
        if not beams or len(finished) >= width:
            beams = []
            break
    return max(finished + beams, key=lambda beam: beam[1] / len(beam[0]) ** sampling.length_penalty)[0]


def searched_by_transformers(
    model: torch.nn.Module, prompt: Sequence[int], beams: int, **settings: object
) -> list[int]:
    out = model.generate(  # type: ignore[operator]
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=beams,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )
    return out[0, len(prompt) :].tolist()


def tokens_of(completions: Sequence[Completion]) -> list[list[int]]:
    return [list(one.token_ids) for one in completions]


@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_is_that_of_transformers(beams: int) -> None:
    prompts = some_prompts(6, longest=20)
    sampling = SamplingConfig(temperature=0, beams=beams, max_tokens=12, eos="ignore")
    with engine_of(MODELS[0], slots=3 * beams) as engine:
        got = tokens_of(engine.generate(prompts, sampling))
    MODELS[0].generation_config.eos_token_id = None
    want = [searched_by_transformers(MODELS[0], prompt, beams, max_new_tokens=12) for prompt in prompts]
    MODELS[0].generation_config.eos_token_id = EOS
    assert got == want
    with engine_of(MODELS[0]) as engine:
        assert tokens_of(engine.generate(prompts, SamplingConfig(temperature=0, max_tokens=12, eos="ignore"))) != want


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beams_end_as_those_of_transformers(penalty: float) -> None:
    model, prompts = ending_often(), some_prompts(12, longest=20)
    sampling = SamplingConfig(temperature=0, beams=3, max_tokens=8, length_penalty=penalty)
    with engine_of(model, slots=9) as engine:
        got = engine.generate(prompts, sampling)
    settings = {"max_new_tokens": 8, "eos_token_id": EOS, "early_stopping": True, "length_penalty": penalty}
    want = [searched_by_transformers(model, prompt, 3, **settings) for prompt in prompts]
    assert tokens_of(got) == want
    assert {one.finish for one in got} == {"eos", "length"}


@pytest.mark.parametrize("contrast", [RAW, PAIR, ALONE], ids=["raw", "normalised", "alone"])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_beams_are_the_slow_ones(temperature: float, contrast: ContrastConfig) -> None:
    models = (ending_often(), MODELS[1])[: len(contrast.models)]
    prompts = some_prompts(5, longest=30)
    samplings = [
        SamplingConfig(temperature=temperature, beams=beams, max_tokens=8, eos=eos)  # type: ignore[arg-type]
        for beams, eos in [(2, "stop"), (4, "stop"), (3, "ignore"), (5, "stop"), (4, "stop")]
    ]
    with engine_of(*models, contrast=contrast, slots=7) as engine:
        got = engine.generate(prompts, samplings, seed=1)
    for index, (prompt, sampling, one) in enumerate(zip(prompts, samplings, got, strict=True)):
        chance = uniforms(seed_of(1, index), 2 * sampling.beams * CONTEXT) if temperature else None
        assert list(one.token_ids) == slow_beams(models, prompt, sampling, contrast, chance)
        ids, scores = list(prompt), []
        for token in one.token_ids:
            scores.append(next_scores(models, ids, contrast)[token])
            ids.append(token)
        assert one.log_probs == pytest.approx(scores, abs=1e-4)


def test_beams_beside_single_texts() -> None:
    prompts = some_prompts(8)
    beams, single = SamplingConfig(beams=3, max_tokens=20, eos="ignore"), SamplingConfig(max_tokens=20, eos="ignore")
    samplings = [beams if index % 3 == 1 else single for index in range(8)]
    with engine_of(*MODELS, contrast=RAW, slots=5) as engine:
        for index, one in enumerate(engine.generate(prompts, samplings)):
            if samplings[index] is single:
                want = slow_text(MODELS, tuple(prompts[index]), single, seed_of(0, index), RAW)[0]
            else:
                chance = uniforms(seed_of(0, index), 6 * CONTEXT)
                want = slow_beams(MODELS, prompts[index], beams, RAW, chance)
            assert list(one.token_ids) == want


def test_gamma_0_and_alpha_0_are_plain_beam_sampling_of_the_positive_model() -> None:
    """CGE 3.8.1, against a sampler with chance of its own."""
    prompt, draws, random = [10, 200, 37, 4], 1500, np.random.default_rng(0)
    models = MODELS
    settings = SamplingConfig(beams=2, max_tokens=2, eos="ignore", gamma=0, alpha=0)
    with engine_of(*models, slots=400, contrast=RAW) as engine:
        got = tokens_of(engine.generate([prompt] * draws, settings))
    first = np.exp(next_scores(models[:1], prompt, ALONE))
    likely = np.argsort(-first)[:12].tolist()
    second = {token: next_scores(models[:1], [*prompt, token], ALONE) for token in range(TOKENS)}
    want = []
    for _ in range(draws):
        # Both beams begin as the same: the scores of the first step stand twice in the pool.
        pool = np.concatenate([first, first]) / 2
        begun = [index % TOKENS for index in random.choice(2 * TOKENS, 4, replace=False, p=pool / pool.sum())]
        kept = sorted(begun, key=lambda token: -first[token])[:2]
        totals = np.concatenate([np.log(first[token]) + second[token] for token in kept])
        pool = np.exp(log_softmax(totals))
        ended = random.choice(2 * TOKENS, 4, replace=False, p=pool / pool.sum())
        best = max(ended, key=lambda index: totals[index])
        want.append([kept[best // TOKENS], best % TOKENS])
    table = [[sum(tokens[0] == token for tokens in side) for token in likely] for side in (got, want)]
    table = [[*row, draws - sum(row)] for row in table]
    kept_columns = [column for column in zip(*table, strict=True) if sum(column) >= 20]
    assert len(kept_columns) >= 3
    assert stats.chi2_contingency(np.array(kept_columns).T).pvalue > 1e-3
    seconds = [np.array([tokens[1] for tokens in side]) for side in (got, want)]
    assert stats.ks_2samp(*seconds).pvalue > 1e-3


def test_a_narrow_choice_needs_fewer_beams() -> None:
    """With alpha 1 one token is plausible; the beams that have nothing to go on from must not disturb."""
    sampling = SamplingConfig(beams=3, max_tokens=10, alpha=1.0, eos="ignore")
    prompts = some_prompts(4)
    with engine_of(*MODELS, slots=3) as engine, engine_of(MODELS[0]) as alone:
        want = alone.generate(prompts, SamplingConfig(temperature=0, max_tokens=10, eos="ignore"))
        for temperature in (0.0, 1e-300, 1.0):
            got = engine.generate(prompts, sampling.model_copy(update={"temperature": temperature}))
            assert tokens_of(got) == tokens_of(want)


def test_more_beams_than_slots_are_refused_and_hold_nobody_up() -> None:
    with engine_of(*MODELS, slots=2) as engine:
        samplings = [SamplingConfig(max_tokens=30), SamplingConfig(beams=3), SamplingConfig(max_tokens=3)]
        finished = [delta.id for delta in engine.stream([[1], [2], [3]], samplings) if delta.completion]
        (_, refused, _) = engine.generate([[1], [2], [3]], samplings)
    assert finished[0] == "1"
    assert refused.finish == "error" and refused.error == "request 1: 3 beams need as many slots; the engine has 2"


def test_a_stop_string_cuts_the_best_beam() -> None:
    with engine_of(*MODELS) as engine:
        sampling = SamplingConfig(beams=3, max_tokens=25, eos="ignore")
        (whole,) = engine.generate(["abc"], sampling)
        at = next(at for at in range(2, 25) if whole.text[at : at + 1].isascii())
        (cut,) = engine.generate(["abc"], sampling.model_copy(update={"stop": (whole.text[at],)}))
    assert cut.finish == "stop" and cut.text == whole.text[: whole.text.index(whole.text[at])]
