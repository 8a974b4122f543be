"""What a lane's worker keeps open for all its jobs: the fine-tune, the reference, and engines over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from isoray.errors import DataError, UserError
from isoray.exploration.config import LearnConfig
from isoray.exploration.reference import Reference, Tokens
from isoray.generation.batch import answer
from isoray.generation.contrast import ContrastConfig, Role
from isoray.generation.engine import Completion, Request, TokenScores
from isoray.generation.sampling import SamplingConfig
from isoray.generation.text import TextStream
from isoray.generation.transformers import TransformersEngine
from isoray.models.config import LoadOptions
from isoray.models.load import LoadedModel, load
from isoray.models.structure import plain
from isoray.objectives.reduce import token_nll
from isoray.training.config import ComputeConfig
from isoray.training.lanes import Rank
from isoray.training.parallel import Ranks

Source = Literal["contrast", "tuned", "base"]
"""What texts are drawn from: the fine-tune against the reference, the fine-tune alone, the pre-trained model alone."""


@dataclass(frozen=True)
class OpenBench:
    """Opens a :class:`Bench` in a worker; picklable."""

    tuned: Path
    """Transformers folder of the fine-tune."""
    base: Path
    """Transformers folder of the pre-trained model."""
    options: LoadOptions
    """How both are loaded; an adapter is what the reference learns with."""
    engine: TransformersEngine.Config
    learn: LearnConfig
    alpha: float
    gamma: float
    compute: ComputeConfig
    seed: int

    def __call__(self, rank: Rank) -> Bench:
        """The bench of the worker at ``rank``."""
        return Bench(self, rank)


class Bench:
    """The two models on this worker's device."""

    def __init__(self, plan: OpenBench, rank: Rank) -> None:
        ranks = Ranks(rank.rank, rank.world, torch.device(rank.device))
        self.progress = rank.progress
        """Tell how much of the current job is done, from 0 to 1; it also proves that the job is alive."""
        self._config = plan.engine.model_copy(update={"device": rank.device})
        self._folders: dict[Source, str] = {"tuned": str(plan.tuned), "base": str(plan.base)}
        self._engines: dict[Source, TransformersEngine] = {}
        whole = plan.options.model_copy(update={"adapter": None})
        self._tuned = load(plan.tuned, whole, seed=plan.seed)
        self._reference = load(plan.base, plan.options, seed=plan.seed)
        contrast = ContrastConfig(
            positive=str(plan.tuned), negative=str(plan.base), alpha=plan.alpha, gamma=plan.gamma, normalise=False
        )
        models: dict[Role, LoadedModel] = {"positive": self._tuned, "negative": self._reference}
        self._contrast = TransformersEngine(self._config, contrast, models)
        self.reference = Reference(
            self._reference.model, plan.base, plan.learn, ranks=ranks, compute=plan.compute, seed=plan.seed
        )

    @cached_property
    def start(self) -> list[int]:
        """The token that a text starts from when it goes on from nothing."""
        tokenizer = self._tuned.tokenizer
        return self._contrast.encode(str(tokenizer.bos_token or tokenizer.eos_token))

    def draw(
        self,
        source: Source,
        learnt: Sequence[Tokens],
        prompt: str | None,
        sampling: SamplingConfig,
        seeds: Mapping[int, int],
    ) -> dict[int, Completion]:
        """A text for each number of ``seeds``, drawn with that seed and the reference that has learnt ``learnt``.

        ``prompt`` None starts from the start token alone. A text that could not be drawn comes with an error. Raises
        UserError for texts that are longer than the models' context.
        """
        context = self._contrast.context
        if sampling.max_tokens >= context:
            raise UserError(
                f"explore.sampling.max_tokens is {sampling.max_tokens}, but with its start token a text must fit into "
                f"the models' context of {context} tokens; set at most {context - 1}."
            )
        engine = self._contrast if source == "contrast" else self._alone(source)
        if source == "contrast":
            self.reference.learn(learnt)
        start = self.start if prompt is None else prompt
        requests = [Request(str(number), start, sampling, seed) for number, seed in seeds.items()]
        return {int(key): completion for key, completion in answer(engine, requests).items()}

    def whole(self, completion: Completion) -> Tokens:
        """All tokens of a text, from its start token on."""
        return (*self._contrast.encode(completion.prompt), *completion.token_ids)

    def encode(self, text: str, most: int) -> Tokens:
        """The first tokens of a given text, with the start token, at most ``most``; DataError for one without any."""
        ids = self._tuned.tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise DataError(f"the example {text!r:.60} has no tokens; remove it")
        return (*self.start, *ids)[: min(most, self._contrast.context)]

    def pieces(self, text: Tokens) -> list[str]:
        """What each token but the first adds to the text."""
        stream = TextStream(self._tuned.tokenizer.backend_tokenizer, list(text[:1]), ())
        pieces = []
        for token in text[1:]:
            stream.push([token])
            pieces.append(stream.take())
        if pieces:
            pieces[-1] += stream.take(last=True)
        return pieces

    def score(self, texts: Sequence[Tokens]) -> list[TokenScores]:
        """Log-probabilities of ``texts`` under the fine-tune (`positive`) and the pre-trained model (`negative`)."""
        self.reference.learn(())
        return self._contrast.score(texts)

    @torch.no_grad()
    def vectors(self, texts: Sequence[Tokens]) -> np.ndarray:
        """float32 [N, H]: of each text the mean of the fine-tune's last hidden states, but for the start token's."""
        model: Any = plain(self._tuned.model)
        found = []
        for text in texts:
            ids_1T = torch.tensor([text], device=model.device)
            hidden_TH = model(input_ids=ids_1T, output_hidden_states=True, use_cache=False).hidden_states[-1][0]
            found.append(hidden_TH[1:].float().mean(0).cpu().numpy())
        return np.stack(found)

    def gradient_norms(self, texts: Sequence[Tokens]) -> list[float]:
        """Of each text, the norm of the gradient of its mean negative log-likelihood under the pre-trained model."""
        self.reference.learn(())
        model = self._reference.model
        device = plain(model).device
        norms = []
        for text in texts:
            ids_1T = torch.tensor([text], device=device)
            token_nll(model, {"input_ids": ids_1T, "labels": ids_1T}).nll_N.mean().backward()  # type: ignore[no-untyped-call]
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            model.zero_grad(set_to_none=True)
        return norms

    def _alone(self, source: Source) -> TransformersEngine:
        """An engine over one of the models, opened when it is first asked for."""
        self.reference.learn(())
        if source not in self._engines:
            model = self._tuned if source == "tuned" else self._reference
            contrast = ContrastConfig(positive=self._folders[source])
            self._engines[source] = TransformersEngine(self._config, contrast, {"positive": model})
        return self._engines[source]
