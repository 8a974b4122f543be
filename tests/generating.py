"""Tiny models to generate with, and the slow, obvious way to generate: every token from a whole pass, in float64."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toy_tokenizer import EOS, save_byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from isoray.generation.contrast import ContrastConfig, Form, Role
from isoray.generation.sampling import SamplingConfig, seed_of, uniforms
from isoray.generation.transformers import TransformersEngine
from isoray.models.load import LoadedModel, load_tokenizer

TOKENS = 258
"""Bytes, <s> and </s>."""
CONTEXT = 64
PAIR = ContrastConfig(positive="p", negative="n")
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32},
    "gpt2": {"n_layer": 2, "n_head": 2},
}


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(save_byte_tokenizer(Path(folder)))


def tiny(seed: int, kind: str = "llama", dtype: torch.dtype = torch.float64, **settings: Any) -> PreTrainedModel:
    """A model that looks at all of its text (a fresh one hardly does); float64, so that no rounding can matter."""
    torch.manual_seed(seed)
    size = {"vocab_size": TOKENS, "hidden_size": 16, "max_position_embeddings": CONTEXT, **SIZES.get(kind, {})}
    config = AutoConfig.for_model(kind, **(size | settings))
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.5)
    model.generation_config.eos_token_id = EOS
    return model.to(dtype)


def engine_of(
    *models: PreTrainedModel,
    contrast: ContrastConfig | None = None,
    tokenizers: Sequence[PreTrainedTokenizerFast] | None = None,
    **settings: Any,
) -> TransformersEngine:
    """An engine with ``models`` in the order of the contrast's; by default the positive and the negative."""
    if contrast is None:
        contrast = PAIR if len(models) == 2 else ContrastConfig(positive="p")
    held: dict[Role, LoadedModel] = {
        role: LoadedModel(model, tokenizers[index] if tokenizers else tokenizer(), "causal")
        for index, (role, model) in enumerate(zip(contrast.models, models, strict=True))
    }
    return TransformersEngine(TransformersEngine.Config(device="cpu", **settings), contrast, held)


def logits_after(model: torch.nn.Module, ids: Sequence[int]) -> np.ndarray:
    """What ``model`` gives for the next token, computed from all of the text."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1, :TOKENS].double().numpy()


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max()
    return shifted - np.log(np.exp(shifted).sum())


def slow_scores(
    logits: Sequence[np.ndarray], form: Form, gamma: float, alpha: float, forbidden: Sequence[int] = ()
) -> np.ndarray:
    """The raw contrast of one row, by the formulas of the papers."""
    logits = [values.astype(np.float64).copy() for values in logits]
    for values in logits:
        values[list(forbidden)] = -np.inf
    probabilities = [np.exp(log_softmax(values)) for values in logits]
    if len(logits) == 1:
        return log_softmax(logits[0])
    scores = np.full(len(logits[0]), -np.inf)
    for token in range(len(scores)):
        first = probabilities[0][token]
        if first == 0 or first < alpha * probabilities[0].max():
            continue
        logs = [math.log(values[token]) for values in probabilities]
        if form == "ratio":
            scores[token] = logs[0] - logs[1] if math.isinf(gamma) else logs[0] - gamma * logs[1]
        elif form == "extrapolation":
            scores[token] = logs[0] - logs[1] if math.isinf(gamma) else (1 + gamma) * logs[0] - gamma * logs[1]
        else:
            scores[token] = logs[1] - logs[2] if math.isinf(gamma) else logs[0] + gamma * (logs[1] - logs[2])
    return scores


def slow_draw(scores: np.ndarray, uniform: float, sampling: SamplingConfig) -> int:
    """A token by the inverse cumulative distribution, in the order of the vocabulary."""
    if sampling.temperature == 0:
        return int(scores.argmax())
    probabilities = np.exp(log_softmax(scores / sampling.temperature))
    best_first = np.argsort(-scores, kind="stable")
    kept = list(best_first[: sampling.top_k or len(scores)])
    reached, last = 0.0, len(kept)
    for rank, token in enumerate(kept):
        reached += probabilities[token] / probabilities[kept].sum()
        if reached >= sampling.top_p:
            last = rank + 1
            break
    left = np.zeros(len(scores))
    left[kept[:last]] = probabilities[kept[:last]]
    cumulative = left.cumsum()
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


@functools.cache
def slow_text(
    models: tuple[torch.nn.Module, ...],
    prompt: tuple[int, ...],
    sampling: SamplingConfig,
    seed: int,
    contrast: ContrastConfig = PAIR,
) -> tuple[list[int], list[float]]:
    """The new tokens of one text and their log-probabilities, as an engine must give them.

    Remembered: call ``slow_text.cache_clear()`` after a change of a model.
    """
    ids, log_probs = list(prompt), []
    chance = uniforms(seed, CONTEXT)
    while len(ids) < min(len(prompt) + sampling.max_tokens, CONTEXT):
        scores = slow_scores(
            [logits_after(model, ids) for model in models],
            contrast.resolved_form,
            contrast.gamma if sampling.gamma is None else sampling.gamma,
            contrast.alpha if sampling.alpha is None else sampling.alpha,
            forbidden=[EOS] if sampling.eos == "forbid" else [],
        )
        token = slow_draw(scores, chance[len(ids) - len(prompt)], sampling)
        log_probs.append(float((log_softmax(scores) if contrast.normalise else scores)[token]))
        ids.append(token)
        if token == EOS and sampling.eos == "stop":
            break
    return ids[len(prompt) :], log_probs


def assert_as_slow(
    engine: TransformersEngine,
    models: Sequence[torch.nn.Module],
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[SamplingConfig],
    contrast: ContrastConfig = PAIR,
    seed: int = 3,
) -> None:
    """``engine`` gives token for token what the slow way gives."""
    for index, got in enumerate(engine.generate(prompts, samplings, seed=seed)):
        want, log_probs = slow_text(
            tuple(models), tuple(prompts[index]), samplings[index], seed_of(seed, index), contrast
        )
        assert list(got.token_ids) == want, f"request {index}: {samplings[index]}"
        np.testing.assert_allclose(got.log_probs, log_probs, atol=1e-4, rtol=1e-5)
        assert got.finish == ("eos" if want[-1] == EOS and samplings[index].eos == "stop" else "length")


def some_prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, random.integers(1, longest + 1)).tolist() for _ in range(count)]


def mixed(count: int, seed: int = 0) -> list[SamplingConfig]:
    """Settings of all kinds, for texts drawn token by token."""
    random = np.random.default_rng(seed)
    choices: Mapping[str, Sequence[Any]] = {
        "temperature": (0.0, 0.7, 1.0, 1.0, 1.6),
        "top_k": (0, 0, 5, 40),
        "top_p": (1.0, 1.0, 0.6),
        "eos": ("stop", "ignore", "forbid"),
        "alpha": (None, 0.0, 0.3, 1.0),
        "gamma": (None, 0.0, 0.5, math.inf),
    }
    return [
        SamplingConfig(
            max_tokens=int(random.integers(1, 30)),
            **{key: values[random.integers(len(values))] for key, values in choices.items()},
        )
        for _ in range(count)
    ]
