"""Both engines on the real 135M model, held to the same slow reference."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chisquare

from isoray.errors import UserError
from isoray.generation.contrast import ContrastConfig, Role
from isoray.generation.engine import Engine, Request
from isoray.generation.sampling import SamplingConfig
from isoray.models.load import LoadedModel, load
from isoray.models.structure import logits_at

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

SENTENCE = (
    "The history of science is a long story about people who wanted to know how things work , and about the tools that "
    "they built on the way : telescopes , scales , clocks and , much later , machines that add and multiply"
)
PROMPTS = [" ".join(SENTENCE.split()[first : first + 1 + 2 * (first % 9)]) for first in range(20)]
NEW_TOKENS = 12
GREEDY = SamplingConfig(temperature=0, max_tokens=NEW_TOKENS, eos="ignore")


def need_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: make install (for CPUs), or pip install 'isoray[vllm]'")


def open_engine(kind: str, contrast: ContrastConfig) -> Engine:
    if kind == "vllm":
        need_vllm()
        from isoray.generation.vllm import VllmEngine

        return VllmEngine(VllmEngine.Config(context=512), contrast)
    from isoray.generation.transformers import TransformersEngine

    return TransformersEngine(TransformersEngine.Config(context=512), contrast)


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def engine(request: pytest.FixtureRequest, smollm2: Path, changed: Path) -> Iterator[Engine]:
    """The contrast of the model and its changed copy."""
    with open_engine(request.param, ContrastConfig(positive=str(smollm2), negative=str(changed))) as opened:
        yield opened


@pytest.fixture(scope="module")
def models(smollm2: Path, changed: Path) -> dict[Role, LoadedModel]:
    return {"positive": load(smollm2), "negative": load(changed)}


Scores = Callable[[Sequence[Sequence[int]]], torch.Tensor]


@pytest.fixture(scope="module")
def reference(models: dict[Role, LoadedModel]) -> Scores:
    """The contrast (alpha 0.1, gamma 1) after each of some texts: both models over the whole texts, without a cache."""

    @torch.no_grad()
    def scores(texts: Sequence[Sequence[int]]) -> torch.Tensor:
        length = max(map(len, texts))
        ids_BT = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])
        last_BT = torch.arange(length) == torch.tensor([[len(text) - 1] for text in texts])
        mask_BT = torch.arange(length) < torch.tensor([[len(text)] for text in texts])
        log_p, log_n = (
            logits_at(loaded.model, {"input_ids": ids_BT, "attention_mask": mask_BT}, last_BT).log_softmax(-1)
            for loaded in models.values()
        )
        plausible = log_p.exp() >= 0.1 * log_p.exp().amax(-1, keepdim=True)
        return torch.where(plausible, log_p - log_n, -torch.inf)

    return scores


@pytest.fixture(scope="module")
def greedy(reference: Scores, models: dict[Role, LoadedModel]) -> list[list[int]]:
    texts = [models["positive"].tokenizer(prompt).input_ids for prompt in PROMPTS]
    starts = [len(text) for text in texts]
    for _ in range(NEW_TOKENS):
        for text, token in zip(texts, reference(texts).argmax(-1).tolist(), strict=True):
            text.append(token)
    return [text[start:] for text, start in zip(texts, starts, strict=True)]


def test_greedy_equals_the_reference(engine: Engine, greedy: list[list[int]]) -> None:
    completions = engine.generate(PROMPTS, GREEDY)
    assert [list(completion.token_ids) for completion in completions] == greedy
    assert len({len(engine.encode(prompt)) for prompt in PROMPTS}) > 5


def test_log_probabilities_of_the_drawn_tokens(engine: Engine, reference: Scores) -> None:
    (completion,) = engine.generate([SENTENCE], SamplingConfig(max_tokens=6), seed=3)
    ids = engine.encode(SENTENCE)
    texts = [[*ids, *completion.token_ids[:count]] for count in range(6)]
    expected = reference(texts).log_softmax(-1)
    drawn = [expected[step, token].item() for step, token in enumerate(completion.token_ids)]
    assert completion.log_probs == pytest.approx(drawn, abs=2e-3)


def test_sampled_distribution_is_the_reference_s(engine: Engine, reference: Scores) -> None:
    draws, prompt = 800, "Once upon a"
    completions = engine.generate([prompt] * draws, SamplingConfig(max_tokens=1, eos="ignore"), seed=5)
    counts = Counter(completion.token_ids[0] for completion in completions)
    probabilities = reference([engine.encode(prompt)])[0].softmax(-1).double().numpy()
    support = np.flatnonzero(probabilities)
    assert set(counts) <= set(support.tolist())
    common = [token for token in support if probabilities[token] * draws >= 5]
    observed = [counts[token] for token in common]
    expected = [probabilities[token] * draws for token in common]
    rest = draws - sum(expected)
    if rest > 1e-6:
        observed, expected = [*observed, draws - sum(observed)], [*expected, rest]
    assert len(common) > 3
    assert chisquare(observed, np.array(expected) / sum(expected) * draws).pvalue > 1e-3


def test_requests_have_their_own_seeds_and_parameters(engine: Engine) -> None:
    sampling = SamplingConfig(max_tokens=8, eos="ignore")
    first, second = (engine.generate([SENTENCE] * 4, sampling, seed=1) for _ in range(2))
    assert [one.token_ids for one in first] == [one.token_ids for one in second]
    assert len({one.token_ids for one in first}) > 1
    greedy = SamplingConfig(temperature=0, max_tokens=8, eos="ignore")
    plain, certain, weak, default = engine.generate(
        [SENTENCE] * 4,
        [
            greedy.model_copy(update={"gamma": 0.0}),
            sampling.model_copy(update={"alpha": 1.0}),
            greedy.model_copy(update={"gamma": 1e-6, "alpha": 0.0}),
            greedy,
        ],
    )
    assert plain.token_ids == certain.token_ids == weak.token_ids != default.token_ids
    assert set(certain.log_probs) == {0.0}


def test_scores_are_each_model_s(engine: Engine, models: dict[Role, LoadedModel]) -> None:
    texts = [SENTENCE, "A short one."]
    for scores, text in zip(engine.score(texts), texts, strict=True):
        ids = torch.tensor([models["positive"].tokenizer(text).input_ids])
        assert list(scores.token_ids) == ids[0].tolist()
        for role, loaded in models.items():
            with torch.no_grad():
                log_probs = loaded.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            expected = log_probs.gather(1, ids[0, 1:, None]).squeeze(1)
            assert scores.log_probs[role] == pytest.approx(expected.tolist(), abs=2e-3)
        assert scores.contrast(engine.contrast) == pytest.approx(
            (np.array(scores.log_probs["positive"]) - np.array(scores.log_probs["negative"])).tolist(), abs=1e-6
        )


def test_stream_brings_the_same_text_in_pieces(engine: Engine) -> None:
    sampling = SamplingConfig(temperature=0, max_tokens=16, eos="ignore")
    whole = engine.generate(PROMPTS[:4], sampling)
    pieces: dict[str, list[str]] = {}
    for delta in engine.stream(PROMPTS[:4], sampling):
        pieces.setdefault(delta.id, []).append(delta.text)
    assert ["".join(pieces[str(index)]) for index in range(4)] == [one.text for one in whole]
    assert all(len(parts) > 4 for parts in pieces.values())
    stop = whole[0].text.split()[3]
    (stopped,) = engine.generate(PROMPTS[:1], sampling.model_copy(update={"stop": (stop,)}))
    assert stopped.finish == "stop"
    assert stopped.text == whole[0].text[: whole[0].text.index(stop)]


def test_end_of_text_can_be_forbidden(engine: Engine) -> None:
    prompt = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
    end = engine.tokenizer.eos_token_id
    prompt = prompt.removesuffix("<|im_end|>")
    usual, forbidden = engine.generate(
        [prompt] * 2,
        [SamplingConfig(temperature=0, gamma=0, max_tokens=20, eos=eos) for eos in ("stop", "forbid")],
    )
    assert usual.finish == "eos" and usual.token_ids[-1] == end and "<|im_end|>" not in usual.text
    assert forbidden.finish == "length" and end not in forbidden.token_ids and len(forbidden.token_ids) == 20


def test_a_bad_request_fails_alone(engine: Engine, greedy: list[list[int]]) -> None:
    too_long = [5] * 600
    for name, prompt in (("empty", ""), ("long", too_long), ("unknown", [10**6]), ("good", PROMPTS[4])):
        engine.add(Request(name, prompt, GREEDY))
    done = {}
    while engine.busy:
        done |= {delta.id: delta.completion for delta in engine.step() if delta.completion is not None}
    assert list(done["good"].token_ids) == greedy[4]
    for name, words in (("empty", "empty"), ("long", "600 tokens"), ("unknown", "1000000")):
        assert done[name].finish == "error"
        assert f"request {name}:" in done[name].error and words in done[name].error


def test_weights_are_replaced_in_part_and_as_a_whole(engine: Engine, changed: Path, greedy: list[list[int]]) -> None:
    weights = load_file(changed / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    engine.update("negative", {name: weights[name] * 2})
    other = [list(one.token_ids) for one in engine.generate(PROMPTS, GREEDY)]
    assert other != greedy
    engine.update("negative", changed)
    assert [list(one.token_ids) for one in engine.generate(PROMPTS, GREEDY)] == greedy
    with pytest.raises(UserError, match="no base model"):
        engine.update("base", changed)


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_experts_that_agree_leave_the_base_alone(kind: str, smollm2: Path, changed: Path) -> None:
    contrast = ContrastConfig(base=str(smollm2), positive=str(changed), negative=str(changed), alpha=0, gamma=2)
    with open_engine(kind, contrast) as triple:
        steered = triple.generate(PROMPTS[:6], GREEDY)
    with open_engine("transformers", ContrastConfig(positive=str(smollm2))) as single:
        alone = single.generate(PROMPTS[:6], GREEDY)
    assert [one.token_ids for one in steered] == [one.token_ids for one in alone]
