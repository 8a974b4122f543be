"""Given texts are scored as a pass of the model says; what breaks, or cannot be answered, disturbs nobody."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generating import (
    CONTEXT,
    PAIR,
    TOKENS,
    engine_of,
    slow_text,
    some_prompts,
    tiny,
)

from isoray.generation.contrast import ContrastConfig
from isoray.generation.engine import Request
from isoray.generation.sampling import SamplingConfig, seed_of

SAMPLING = SamplingConfig(max_tokens=12, eos="ignore")
PROMPTS = some_prompts(6)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_scores_are_the_log_softmax_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [tiny(0), tiny(1, vocab_size=TOKENS + 7)]
    texts = ["a", *some_prompts(9, longest=CONTEXT), [3] * CONTEXT]
    with engine_of(*models) as engine:
        whole = engine.score(texts)
        monkeypatch.setattr("isoray.generation.transformers.SCORE_LOGITS", 100 * TOKENS)
        portions = engine.score(texts)
    for text, one, again in zip(texts, whole, portions, strict=True):
        ids = list(text.encode()) if isinstance(text, str) else text
        assert list(one.token_ids) == ids
        for role, model in zip(("positive", "negative"), models, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, :-1, :TOKENS]
            want = torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]].tolist()
            assert one.log_probs[role] == pytest.approx(want, abs=1e-5)
            assert again.log_probs[role] == pytest.approx(want, abs=1e-5)
        ratio = [p - 0.5 * n for p, n in zip(one.log_probs["positive"], one.log_probs["negative"], strict=True)]
        assert one.contrast(ContrastConfig(positive="p", negative="n", gamma=0.5)) == pytest.approx(ratio)


def test_scores_say_how_generated_texts_were_drawn() -> None:
    with engine_of(tiny(0)) as engine:
        for prompt, one in zip(PROMPTS, engine.generate(PROMPTS, SAMPLING), strict=True):
            (scores,) = engine.score([[*prompt, *one.token_ids]])
            assert scores.log_probs["positive"][len(prompt) - 1 :] == pytest.approx(one.log_probs, abs=1e-4)


def test_a_token_that_a_model_excludes_has_a_score() -> None:
    model = tiny(0)

    def exclude(_: object, __: object, out: Any) -> None:
        out.logits[..., 7] = -torch.inf

    model.register_forward_hook(exclude)
    with engine_of(model, tiny(1)) as engine:
        (scores,) = engine.score([[1, 7, 2]])
        assert scores.error is None and scores.log_probs["positive"][0] == -torch.inf
        assert scores.contrast(PAIR)[0] < -9000


def test_texts_that_cannot_be_scored_are_named() -> None:
    model = tiny(0)
    model.model.embed_tokens.weight.data[99] = torch.nan
    with engine_of(model) as engine:
        scores = engine.score([[1, 2], [], [5] * (CONTEXT + 1), [1, 99, 2], [3]])
        assert [bool(one.error) for one in scores] == [False, True, True, True, False]
        assert scores[3].error == "text 3: the positive model gave logits that are not numbers (NaN or infinite)"
        assert "text 2: the text has 65 tokens, but the model's context holds 64" in str(scores[2].error)
        assert scores[0] == engine.score([[1, 2]])[0]
        assert scores[4].log_probs == {"positive": ()}


@pytest.mark.parametrize("settings", [{}, {"static_cache": True}], ids=["growing", "static"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("token", [0, 77])
def test_numbers_that_are_none_end_their_own_request_only(
    token: int, broken: int, beams: int, settings: dict[str, Any]
) -> None:
    models = tiny(0), tiny(1)
    prompts = [[one for one in prompt if one != token] or [1] for prompt in some_prompts(12)]
    with torch.no_grad():
        for model in models:
            model.lm_head.weight[token] = 0  # hardly ever drawn
    sampling = SamplingConfig(max_tokens=10, eos="ignore", alpha=0.3, beams=beams)
    with engine_of(*models, slots=4, **settings) as engine:
        want = engine.generate(prompts, sampling)
        assert not any(token in one.token_ids for one in want)
    models[broken].model.embed_tokens.weight.data[token] = torch.nan
    guilty = {2: [5, token], 3: [token], 7: [token] * 30, 11: [*[4] * 20, token, 6]}
    for index, prompt in guilty.items():
        prompts[index] = prompt
    with engine_of(*models, slots=4, **settings) as engine:
        got = engine.generate(prompts, sampling)
        again = engine.generate(prompts, sampling)
    role = ("positive", "negative")[broken]
    for index, one in enumerate(got):
        if index in guilty:
            assert one.finish == "error" and one.token_ids == () and one.prompt_tokens == len(prompts[index])
            expected = f"request {index}: the {role} model gave logits that are not numbers (NaN or infinite)"
            assert one.error == expected
        else:
            assert one.token_ids == want[index].token_ids == again[index].token_ids and one.error is None


def test_requests_that_cannot_be_answered() -> None:
    with engine_of(tiny(0), tiny(1), slots=2) as engine:
        prompts = ["", [], [1, TOKENS], [1, -1], [1] * CONTEXT, [1] * (CONTEXT - 1), [2]]
        got = engine.generate(prompts, SAMPLING)
        assert [one.finish for one in got] == [*["error"] * 5, "length", "length"]
        assert got[0].error == "request 0: the prompt is empty; to start from nothing, give the start token '<s>'"
        assert got[2].error == "request 2: the prompt holds token id 258; the models share the ids 0 to 257"
        assert "request 4: the text has 64 tokens, but the model's context holds 64 with the first" in str(got[4].error)
        assert list(got[6].token_ids) == slow_text((tiny(0), tiny(1)), (2,), SAMPLING, seed_of(0, 6))[0]
        engine.add(Request("a name", ""))
        (delta,) = engine.step()
        assert delta.completion and str(delta.completion.error).startswith("request a name: ")
        assert not engine.busy
