"""Requests under way: what was drawn so far, and when a text ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from isoray.generation.engine import Completion, Delta, Finish, Request
from isoray.generation.sampling import uniforms
from isoray.generation.text import TextStream


@dataclass(eq=False)
class Task:
    """A request that was found sound."""

    request: Request
    prompt_ids: list[int]
    limit: int
    """Most new tokens: what was asked for, or what the context leaves."""
    ends: frozenset[int]
    """Tokens that end the text; none where end-of-text is drawn like any other token or cannot come."""

    @property
    def width(self) -> int:
        """How many rows of the engine it takes."""
        return self.request.sampling.beams

    def completion(self, text: str, tokens: Sequence[int], log_probs: Sequence[float], finish: Finish) -> Completion:
        """The answer."""
        request = self.request
        return Completion(
            request.id, request.prompt, text, tuple(tokens), tuple(log_probs), finish, len(self.prompt_ids)
        )


@dataclass(eq=False)
class Single:
    """A text that is drawn token by token, in one row."""

    task: Task
    tokenizer: Tokenizer
    row: int = -1
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        sampling = self.task.request.sampling
        self.uniforms = uniforms(self.task.request.seed, self.task.limit)
        self.text = TextStream(self.tokenizer, self.task.prompt_ids, sampling.stop)

    @property
    def rows(self) -> list[int]:
        """The rows that it holds."""
        return [self.row]

    @property
    def last_tokens(self) -> list[int]:
        """The token that each row goes on from."""
        return self.tokens[-1:]

    def uniform(self) -> float:
        """The number that its next token is drawn with."""
        return float(self.uniforms[len(self.tokens)])

    def push(self, token: int, log_prob: float) -> Delta:
        """Take the token that was drawn; what is new for whoever waits."""
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        finish: Finish | None = None
        if token in self.task.ends:
            finish = "eos"
        else:
            self.text.push([token])
            if self.text.stopped:
                finish = "stop"
            elif len(self.tokens) == self.task.limit:
                finish = "length"
        piece = self.text.take(last=finish is not None)
        completion = None
        if finish is not None:
            completion = self.task.completion(self.text.text, self.tokens, self.log_probs, finish)
        return Delta(self.task.request.id, piece, completion)


@dataclass(eq=False)
class Hypothesis:
    """One beam: its tokens, their scores, and the sum that beams compare by."""

    tokens: list[int]
    scores: list[float]
    total: float
    ended: bool = False

    def grown(self, token: int, score: float, total: float, *, ended: bool) -> Hypothesis:
        """This beam and one more token."""
        return Hypothesis([*self.tokens, token], [*self.scores, score], total, ended)

    def rank(self, length_penalty: float) -> float:
        """What finished beams compare by."""
        return float(self.total / len(self.tokens) ** length_penalty)


@dataclass(eq=False)
class Beams:
    """A text that is searched, or drawn, with several beams, a row each. It comes as a whole when it ends.

    Beam search (temperature 0) starts from one beam; beam sampling from as many equal ones, as in the published code of
    CGE (Transformers 4.34, ``beam_sample``). It ends when as many beams as there are have ended, or at the limit.
    """

    task: Task
    tokenizer: Tokenizer
    rows: list[int] = field(default_factory=list)
    finished: list[Hypothesis] = field(default_factory=list)

    def __post_init__(self) -> None:
        sampling = self.task.request.sampling
        self.greedy = sampling.temperature == 0
        totals = [0.0] + [-np.inf if self.greedy else 0.0] * (sampling.beams - 1)
        self.beams = [Hypothesis([], [], total) for total in totals]
        self.uniforms = uniforms(self.task.request.seed, self.task.limit * 2 * sampling.beams)

    @property
    def last_tokens(self) -> list[int]:
        """The token that each row goes on from."""
        return [beam.tokens[-1] for beam in self.beams]

    @property
    def candidates(self) -> int:
        """How many of the best next tokens a search looks at: enough to go on with all beams if every end is there."""
        return max(2, 1 + len(self.task.ends)) * self.task.width

    def uniforms_now(self) -> np.ndarray:
        """The numbers that this step's candidates are drawn with, twice as many as beams."""
        count = 2 * self.task.width
        begin = len(self.beams[0].tokens) * count
        return self.uniforms[begin : begin + count]

    def push(self, candidates: list[tuple[int, int, float, float]]) -> list[int] | None:
        """Take ``(beam, token, score, total)``, the best total first; the beams that the new ones go on from.

        None: the text has ended.
        """
        width, new, parents = self.task.width, list[Hypothesis](), list[int]()
        for rank, (beam, token, score, total) in enumerate(candidates):
            ended = token in self.task.ends
            hypothesis = self.beams[beam].grown(token, score, total, ended=ended)
            if not ended:
                new.append(hypothesis)
                parents.append(beam)
            elif rank < width:
                self.finished.append(hypothesis)
            if len(new) == width:
                break
        if not new or len(self.finished) >= width:
            self.beams = []
            return None
        while len(new) < width:  # too few plausible tokens: a row that nothing goes on from
            new.append(Hypothesis(new[0].tokens, new[0].scores, -np.inf))
            parents.append(parents[0])
        self.beams = new
        return None if len(new[0].tokens) == self.task.limit else parents

    def result(self) -> Delta:
        """The best beam, ended or not."""
        sampling = self.task.request.sampling
        best = max(self.finished + self.beams, key=lambda beam: beam.rank(sampling.length_penalty))
        text = TextStream(self.tokenizer, self.task.prompt_ids, sampling.stop)
        text.push(best.tokens)
        finish: Finish = "stop" if text.stopped else "eos" if best.ended else "length"
        completion = self.task.completion(text.text, best.tokens, best.scores, finish)
        return Delta(self.task.request.id, text.text, completion)
