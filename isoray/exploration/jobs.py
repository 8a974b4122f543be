"""The jobs of an exploration: texts are drawn, and told how new they are. Each runs on a lane's bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isoray.errors import NumericError
from isoray.exploration.bench import Bench, Source
from isoray.exploration.reference import Tokens
from isoray.generation.engine import TokenScores
from isoray.generation.sampling import SamplingConfig, seed_of


@dataclass(frozen=True)
class Draw:
    """Some texts of an exploration, drawn side by side."""

    key: str
    source: Source
    numbers: tuple[int, ...]
    """Which texts of the exploration."""
    seed: int
    """Of the exploration; each text has its own from it."""
    sampling: SamplingConfig
    prompt: str | None
    learnt: tuple[Tokens, ...] = ()
    """What the reference has learnt by then."""

    @property
    def cost(self) -> float:
        return float(len(self.numbers))

    def run(self, bench: Bench) -> Mapping[str, Any]:
        """Each text: its tokens from the start token on, and what is new in words."""
        seeds = {number: seed_of(self.seed, number) for number in self.numbers}
        completions = bench.draw(self.source, self.learnt, self.prompt, self.sampling, seeds)
        texts: list[dict[str, Any]] = []
        for number in self.numbers:
            completion = completions[number]
            if completion.error is not None:
                texts.append({"tokens": [], "text": "", "error": completion.error})
            else:
                texts.append({"tokens": bench.whole(completion), "text": completion.text, "error": None})
            bench.progress(len(texts) / len(self.numbers))
        return {"texts": texts}


@dataclass(frozen=True)
class Tell:
    """How new given texts are, by the models as they came: the contrast at every token, likelihoods, a vector."""

    key: str
    texts: tuple[Tokens, ...]

    @property
    def cost(self) -> float:
        return float(sum(map(len, self.texts)))

    def run(self, bench: Bench) -> Mapping[str, Any]:
        """Of each text: log-probabilities of all tokens but the first by both models, its vector, its tokens' words."""
        scores = bench.score(self.texts)
        bench.progress(0.5)
        _check(scores)
        return {
            "tuned": [score.log_probs["positive"] for score in scores],
            "base": [score.log_probs["negative"] for score in scores],
            "vectors": bench.vectors(self.texts),
            "pieces": [bench.pieces(text) for text in self.texts],
        }


@dataclass(frozen=True)
class Detect:
    """How new given examples are, by the contrast and by what it is compared with."""

    key: str
    texts: tuple[str, ...]
    tokens: int
    """So many tokens of each are looked at."""

    @property
    def cost(self) -> float:
        return float(len(self.texts) * self.tokens)

    def run(self, bench: Bench) -> Mapping[str, Any]:
        """Of each example the mean contrast, the mean log-probabilities, and the gradient's norm."""
        found: dict[str, list[float]] = {"tuned": [], "base": [], "gradient_norm": []}
        examples = [bench.encode(text, self.tokens) for text in self.texts]
        scores = bench.score(examples)
        _check(scores)
        for score in scores:
            tuned, base = score.log_probs["positive"], score.log_probs["negative"]
            found["tuned"].append(sum(tuned) / len(tuned))
            found["base"].append(sum(base) / len(base))
        bench.progress(0.3)
        found["gradient_norm"] = bench.gradient_norms(examples)
        return found


def _check(scores: Sequence[TokenScores]) -> None:
    """NumericError for models whose log-probabilities are no numbers."""
    if broken := [score.error for score in scores if score.error is not None]:
        raise NumericError(f"{broken[0]}; load the model again, or compute it in another precision")
