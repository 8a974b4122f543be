"""What every engine is: requests go in, tokens come out step by step, texts are scored, weights are replaced.

``transformers`` and ``vllm`` implement :class:`Engine` and are held to the same conformance tests. A request that
cannot be answered ends with an error that names it; the others of its batch are not touched.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from isoray.config.base import Component
from isoray.errors import DataError
from isoray.generation.contrast import ContrastConfig, Role, raw_score
from isoray.generation.sampling import SamplingConfig, seed_of

Prompt = str | Sequence[int]
"""A text, or token ids that are taken as they are."""
Finish = Literal["eos", "stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """One text to generate."""

    id: str
    """Names it in what comes back and in errors; different for all requests that are under way."""
    prompt: Prompt
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    """All chance in this text hangs on it."""


@dataclass(frozen=True)
class Completion:
    """The answer to one request."""

    id: str
    prompt: Prompt
    text: str
    """Without special tokens and without the stop string; empty where the request failed."""
    token_ids: tuple[int, ...]
    """The new tokens, with the end-of-text token where one was drawn."""
    log_probs: tuple[float, ...]
    """Of each token: its log-probability under the normalised contrast (before temperature, top-k and top-p), or its
    raw score with ``normalise: false``."""
    finish: Finish
    """Why it ended: end-of-text token, stop string, ``max_tokens`` or the context, or an error."""
    prompt_tokens: int
    error: str | None = None
    """What was wrong with the request, in words; None if nothing was."""


@dataclass(frozen=True)
class Delta:
    """What a step brought for one request."""

    id: str
    text: str
    """What was added to the text. Held back while it may become a stop string or half a character."""
    completion: Completion | None = None
    """The whole answer, with the last delta."""


@dataclass(frozen=True)
class TokenScores:
    """How likely the models find a given text."""

    token_ids: tuple[int, ...]
    """All tokens of the text."""
    log_probs: Mapping[Role, tuple[float, ...]]
    """For each model, the log-probability of every token but the first, given those before it."""
    error: str | None = None
    """What was wrong with the text; it then has no log-probabilities."""

    def contrast(self, config: ContrastConfig) -> list[float]:
        """The raw contrast at every token but the first; its mean ranks texts by novelty (CGE, detection)."""
        return raw_score(self.log_probs, config.resolved_form, config.gamma)


class Engine(Component, ABC):
    """Models in memory, ready to generate. A context manager: leaving it frees them."""

    class Config(Component.Config):
        """What every engine's config has."""

        kind: str
        """Which engine: `transformers` or `vllm`."""
        slots: int = Field(default=16, ge=1)
        """How many sequences are computed side by side."""
        context: int | None = Field(default=None, ge=2)
        """Longest sequence, prompt and new tokens together; default: what the models were made for."""

    config: Config
    contrast: ContrastConfig
    """Which models are contrasted, and how, where a request says nothing else."""
    tokenizer: PreTrainedTokenizerFast
    context: int
    vocabulary: int | None = None
    """Token ids below this one mean the same to all models; None: those that the tokenizer has."""

    @abstractmethod
    def add(self, request: Request) -> None:
        """Take a request; it is worked on from the next step on. A request that cannot be answered fails there, too."""

    @abstractmethod
    def step(self) -> list[Delta]:
        """Compute at most one more token for each request under way, and start waiting ones where there is room."""

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """Drop a request, if it is still there."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether some request is waiting or under way."""

    @abstractmethod
    def score(self, texts: Sequence[Prompt]) -> list[TokenScores]:
        """Log-probabilities of given texts under each model, in the order of ``texts``."""

    @abstractmethod
    def update(self, role: Role, weights: Mapping[str, Tensor] | Path) -> None:
        """Replace weights of one model: those named (as in its state dict), or all, from a Transformers folder.

        Only between requests. Raises UserError for a name or shape that the model does not have.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the models."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        seed: int = 0,
    ) -> list[Completion]:
        """The answers to ``prompts``, in their order; prompt number i has the seed ``seed_of(seed, i)``."""
        completions = [delta.completion for delta in self.stream(prompts, sampling, seed=seed) if delta.completion]
        place = {completion.id: completion for completion in completions}
        return [place[str(index)] for index in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        seed: int = 0,
    ) -> Iterator[Delta]:
        """As :meth:`generate`, but what each step brings, as it comes; a delta's ``id`` is its prompt's number."""
        assert not self.busy, "stream and generate are for an engine without other requests: use add and step"
        settings = sampling or SamplingConfig()
        each = [settings] * len(prompts) if isinstance(settings, SamplingConfig) else list(settings)
        open_ids = set[str]()
        for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
            self.add(Request(str(index), prompt, one, seed_of(seed, index)))
            open_ids.add(str(index))
        try:
            while self.busy:
                for delta in self.step():
                    if delta.completion is not None:
                        open_ids.discard(delta.id)
                    yield delta
        finally:
            for request_id in open_ids:
                self.cancel(request_id)

    def encode(self, prompt: Prompt, *, new_tokens: int = 1) -> list[int]:
        """The token ids of a prompt that so many new tokens must be able to follow.

        Raises DataError for one that is empty, too long, or holds an unknown id.
        """
        ids = _encode_text(self.tokenizer, prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids or prompt == "":
            start = self.tokenizer.bos_token or self.tokenizer.eos_token
            raise DataError(f"the prompt is empty; to start from nothing, give the start token {start!r}")
        known = self.vocabulary or len(self.tokenizer)
        if unknown := [token for token in ids if not 0 <= token < known]:
            raise DataError(f"the prompt holds token id {unknown[0]}; the models share the ids 0 to {known - 1}")
        if len(ids) + new_tokens > self.context:
            raise DataError(
                f"the text has {len(ids)} tokens, but the model's context holds {self.context}"
                f"{' with the first new one' if new_tokens else ''}; shorten it"
            )
        return ids


def failed(request: Request, reason: str, *, prompt_tokens: int = 0) -> Delta:
    """The end of a request that cannot be answered."""
    message = f"request {request.id}: {reason}"
    return Delta(request.id, "", Completion(request.id, request.prompt, "", (), (), "error", prompt_tokens, message))


def not_numbers(roles: Iterable[str]) -> str:
    """What is said where models gave NaN or infinite logits."""
    return (
        f"the {' and the '.join(f'{role} model' for role in roles)} gave logits that are not numbers (NaN or infinite)"
    )


def token_scores(index: int, ids: Sequence[int], log_probs: Mapping[Role, Sequence[float]]) -> TokenScores:
    """The scores of text number ``index``; an error where some model gave numbers that are none."""
    broken = [role for role, values in log_probs.items() if any(map(math.isnan, values))]
    if broken:
        return TokenScores(tuple(ids), {}, f"text {index}: {not_numbers(broken)}")
    return TokenScores(tuple(ids), {role: tuple(values) for role, values in log_probs.items()})


def _encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    encode: Any = tokenizer
    start = tokenizer.bos_token
    # A start token that the text itself begins with is not put before it once more.
    special = not (isinstance(start, str) and text.startswith(start))
    ids = list(encode(text, add_special_tokens=special).input_ids)
    ends_every_text = special and encode("a").input_ids[-1:] == [tokenizer.eos_token_id]
    return ids[:-1] if ends_every_text else ids  # here it is to go on
