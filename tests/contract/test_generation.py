"""An engine gives every request what it would get alone, computed the slow way, whatever goes on beside it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import CONTEXT, PAIR, assert_as_slow, engine_of, mixed, slow_text, some_prompts, tiny, tokenizer
from pydantic import ValidationError
from toy_tokenizer import BOS, EOS, save_byte_tokenizer

from isoray.errors import UserError
from isoray.generation import transformers
from isoray.generation.contrast import ContrastConfig
from isoray.generation.engine import Completion, Request
from isoray.generation.sampling import SamplingConfig, seed_of
from isoray.generation.transformers import TransformersEngine
from isoray.models.load import load_tokenizer

MODELS = tiny(0), tiny(1)


pytestmark = pytest.mark.usefixtures("one_thread")


def shown(completions: Sequence[Completion]) -> list[tuple[Any, ...]]:
    return [(one.token_ids, one.text, one.finish) for one in completions]


@pytest.mark.parametrize("settings", [{}, {"static_cache": True}], ids=["growing", "static"])
@pytest.mark.parametrize("slots", [1, 3, 7, 16])
def test_texts_are_those_of_the_slow_way(slots: int, settings: dict[str, Any]) -> None:
    prompts = some_prompts(14)
    with engine_of(*MODELS, slots=slots, **settings) as engine:
        assert_as_slow(engine, MODELS, prompts, mixed(14))
        assert not engine.busy


@pytest.mark.parametrize(
    "contrast",
    [
        ContrastConfig(positive="p"),
        ContrastConfig(positive="p", negative="n", form="extrapolation", gamma=0.5, normalise=False),
        ContrastConfig(positive="p", negative="n", base="b", gamma=2.0, alpha=0.05),
    ],
    ids=["alone", "extrapolation", "experts"],
)
def test_other_contrasts(contrast: ContrastConfig) -> None:
    models = [tiny(seed) for seed in range(len(contrast.models))]
    with engine_of(*models, contrast=contrast, slots=4) as engine:
        assert_as_slow(engine, models, some_prompts(8), mixed(8, seed=1), contrast)


def test_packed_weights_and_grouped_heads_change_rounding_only() -> None:
    single, double = [[tiny(seed, dtype=dtype) for seed in (0, 1)] for dtype in (torch.float32, torch.float64)]
    prompts, sampling = some_prompts(6), SamplingConfig(max_tokens=20, eos="ignore")
    with engine_of(*single, slots=4) as quick, engine_of(*double, slots=4) as exact:
        for one, other in zip(quick.generate(prompts, sampling), exact.generate(prompts, sampling), strict=True):
            assert one.token_ids == other.token_ids
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-3)


def test_a_text_does_not_hang_on_its_company() -> None:
    prompts = some_prompts(12)
    requests = [
        Request(f"r{index}", prompt, one, seed=index)
        for index, (prompt, one) in enumerate(zip(prompts, mixed(12), strict=True))
    ]
    requests[3] = Request("r3", prompts[3], SamplingConfig(max_tokens=9, beams=3), seed=3)

    def answers(requests: Sequence[Request], slots: int) -> dict[str, Completion]:
        with engine_of(*MODELS, slots=slots) as engine:
            found = {}
            for request in requests:
                engine.add(request)
            while engine.busy:
                found |= {delta.id: delta.completion for delta in engine.step() if delta.completion}
            return found

    want = answers(requests, slots=4)
    assert len(want) == len(requests)
    shuffled = random.Random(0).sample(requests, len(requests))
    for slots in (3, 16):
        got = answers(shuffled, slots)
        for name, one in want.items():
            assert shown([got[name]]) == shown([one])
            assert got[name].log_probs == pytest.approx(one.log_probs, abs=1e-4)
    assert shown(answers(requests[3:4], slots=3).values()) == shown([want["r3"]])


def test_finished_rows_are_filled_again() -> None:
    """Slots do not wait for the slowest of their batch."""
    lengths = [30, *[5] * 12]
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    with engine_of(*MODELS, slots=3) as engine:
        hook = MODELS[0].register_forward_hook(count)
        sampling = [SamplingConfig(max_tokens=length, eos="ignore") for length in lengths]
        engine.generate([[7]] * len(lengths), sampling)
        hook.remove()
    # Two rows take six of the short ones each while the long one goes on; a pass for each prompt at most.
    assert passes <= 30 + 12


def test_prompts_are_computed_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "PREFILL_TOKENS", 50)
    with engine_of(*MODELS, slots=16) as engine:
        assert_as_slow(engine, MODELS, some_prompts(12), mixed(12, seed=2))


def test_a_request_that_comes_later() -> None:
    with engine_of(*MODELS, slots=16) as engine:
        want = engine.generate([[1, 2], [3] * 30], SamplingConfig(max_tokens=20, eos="ignore"), seed=1)
        engine.add(Request("first", [1, 2], SamplingConfig(max_tokens=20, eos="ignore"), seed_of(1, 0)))
        for _ in range(4):
            engine.step()
        engine.add(Request("second", [3] * 30, SamplingConfig(max_tokens=20, eos="ignore"), seed_of(1, 1)))
        assert [delta.id for delta in engine.step()] == ["second"], "it starts at once where there is room"
        found = {}
        while engine.busy:
            found |= {delta.id: delta.completion for delta in engine.step() if delta.completion}
    assert shown([found["first"], found["second"]]) == shown(want)


def test_cancelling_leaves_the_others_as_they_are() -> None:
    prompts, sampling = some_prompts(9), SamplingConfig(max_tokens=15, eos="ignore")
    with engine_of(*MODELS, slots=4) as engine:
        want = engine.generate(prompts, sampling)
        for index, prompt in enumerate(prompts):
            engine.add(Request(str(index), prompt, sampling, seed_of(0, index)))
        found, gone = {}, {"1", "8"}
        for number in range(1000):
            if number == 5:
                for request_id in (*gone, "unknown"):
                    engine.cancel(request_id)
            found |= {delta.id: delta.completion for delta in engine.step() if delta.completion}
            if not engine.busy:
                break
        assert set(found) == {str(index) for index in range(9)} - gone
        assert all(shown([one]) == shown([want[int(name)]]) for name, one in found.items())


def test_a_stream_that_is_left_early_leaves_an_idle_engine() -> None:
    with engine_of(*MODELS, slots=2) as engine:
        stream = engine.stream(some_prompts(5), SamplingConfig(max_tokens=20))
        next(stream)
        stream.close()
        assert not engine.busy
        assert_as_slow(engine, MODELS, some_prompts(3), mixed(3))


def test_deltas_add_up_to_the_text() -> None:
    prompts = ["abc", "東京".encode()[:-1], *some_prompts(6)]
    stop = ("a", "é", "xyz")
    with engine_of(*MODELS, slots=3) as engine:
        pieces = dict.fromkeys(map(str, range(len(prompts))), "")
        finishes = set()
        for delta in engine.stream(prompts, SamplingConfig(max_tokens=40, stop=stop, alpha=0.01)):
            pieces[delta.id] += delta.text
            if delta.completion:
                assert delta.completion.text == pieces[delta.id]
                assert not any(string in pieces[delta.id] for string in stop)
                finishes.add(delta.completion.finish)
    assert "stop" in finishes


def test_a_stop_string_ends_a_text() -> None:
    with engine_of(*MODELS) as engine:
        (whole,) = engine.generate(["abc"], SamplingConfig(max_tokens=30, eos="ignore", alpha=0.01), seed=5)
        middle = next(whole.text[at : at + 2] for at in range(5, 30) if whole.text[at : at + 2].isascii())
        settings = SamplingConfig(max_tokens=30, eos="ignore", alpha=0.01, stop=(middle,))
        (cut,) = engine.generate(["abc"], settings, seed=5)
    assert cut.finish == "stop"
    assert cut.text == whole.text[: whole.text.index(middle)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 30


def test_the_end_of_text() -> None:
    """A model that gives </s> most of the probability."""
    model = tiny(2)
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0
        model.lm_head.weight[EOS] = 4 * model.lm_head.weight.abs().sum(0).sign()
    with engine_of(model) as engine:
        prompts = some_prompts(20)
        by_kind = {
            kind: engine.generate(prompts, SamplingConfig(max_tokens=12, eos=kind))  # type: ignore[arg-type]
            for kind in ("stop", "ignore", "forbid")
        }
    ended = [one for one in by_kind["stop"] if one.finish == "eos"]
    assert ended
    assert all(one.token_ids.index(EOS) == len(one.token_ids) - 1 for one in ended)
    assert all(EOS not in one.token_ids for one in by_kind["stop"] if one.finish != "eos")
    assert all(len(one.token_ids) == 12 and one.finish == "length" for one in by_kind["ignore"])
    assert any(EOS in one.token_ids[:-1] for one in by_kind["ignore"])
    assert all(len(one.token_ids) == 12 and EOS not in one.token_ids for one in by_kind["forbid"])


def test_all_end_tokens_end() -> None:
    """Chat models have an end of turn beside the tokenizer's end of text."""
    model = tiny(2)
    model.generation_config.eos_token_id = [5, 6, 9999]
    with engine_of(model) as engine:
        prompts, count = some_prompts(30), 25
        stopped = engine.generate(prompts, SamplingConfig(max_tokens=count, temperature=2.0))
        free = engine.generate(prompts, SamplingConfig(max_tokens=count, temperature=2.0, eos="ignore"))
        forbidden = engine.generate(prompts, SamplingConfig(max_tokens=count, temperature=2.0, eos="forbid"))
    ends = {5, 6, EOS}
    assert any(ends & set(one.token_ids) for one in free)
    for one, other in zip(stopped, free, strict=True):
        first = next((at + 1 for at, token in enumerate(other.token_ids) if token in ends), len(other.token_ids))
        assert one.token_ids == other.token_ids[:first]
    assert not any(ends & set(one.token_ids) for one in forbidden)


@pytest.mark.parametrize("static", [False, True])
def test_texts_end_with_the_context(static: bool) -> None:
    sampling = SamplingConfig(max_tokens=1000, eos="ignore")
    with engine_of(*MODELS, slots=3, static_cache=static) as engine:
        prompts = [[5] * (CONTEXT - 1), [6] * 10, [7] * (CONTEXT - 20), [8], *[[9] * 50] * 3]
        assert_as_slow(engine, MODELS, prompts, [sampling] * len(prompts))
    with engine_of(*MODELS, context=12, static_cache=static) as engine:
        (one,) = engine.generate([[1, 2, 3]], sampling)
        assert len(one.token_ids) == 9 and one.finish == "length"


def test_prompts_are_texts_or_tokens() -> None:
    with engine_of(*MODELS) as engine:
        one, other = engine.generate(["héllo", list("héllo".encode())], SamplingConfig(max_tokens=5), seed=0)
        (again,) = engine.generate([list("héllo".encode())], SamplingConfig(max_tokens=5), seed=0)
        assert one.token_ids == again.token_ids
        assert (one.prompt, one.prompt_tokens, other.prompt_tokens) == ("héllo", 6, 6)
        assert engine.generate([]) == []


def test_start_and_end_tokens_of_prompts(tmp_path: Path) -> None:
    """The start token comes once, and no end token: the text is to go on."""
    both = load_tokenizer(save_byte_tokenizer(tmp_path, adds_bos=True, adds_eos=True))
    assert both("a").input_ids == [BOS, ord("a"), EOS]
    with engine_of(*MODELS, tokenizers=[both, both]) as engine:
        assert engine.encode("a") == engine.encode("<s>a") == [BOS, ord("a")]
        assert engine.encode("a</s>") == [BOS, ord("a"), EOS]
        assert engine.encode([1, EOS]) == [1, EOS]
    with engine_of(*MODELS) as engine:
        assert engine.encode("a") == [ord("a")]
        assert engine.encode("<s>a") == [BOS, ord("a")]


def test_an_engine_has_slots() -> None:
    for wrong in ({"slots": 0}, {"context": 1}):
        with pytest.raises(ValidationError):
            TransformersEngine.Config(**wrong)


def test_a_growing_cache_is_not_compiled() -> None:
    with pytest.raises(UserError, match="needs `static_cache`"):
        engine_of(*MODELS, compile=True)


def test_one_request_per_prompt_seed() -> None:
    """generate gives prompt i the seed of (seed, i), which anyone can ask for again."""
    with engine_of(*MODELS) as engine:
        _, second = engine.generate([[1], [2]], SamplingConfig(max_tokens=8), seed=4)
    assert list(second.token_ids) == slow_text(MODELS, (2,), SamplingConfig(max_tokens=8), seed_of(4, 1))[0]


def test_the_engine_is_a_component() -> None:
    assert TransformersEngine.kind == "transformers"
    assert TransformersEngine.Config().kind == "transformers"
    assert PAIR.models == {"positive": "p", "negative": "n"}
    assert tokenizer().eos_token_id == EOS
