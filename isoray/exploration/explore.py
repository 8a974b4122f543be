"""Finding texts: each method's explorations as jobs on lanes, one round of the iterative one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from isoray.config.base import digest_of
from isoray.errors import DataError
from isoray.exploration.bench import Source
from isoray.exploration.config import ExploreConfig, Method
from isoray.exploration.jobs import Draw, Tell
from isoray.exploration.ngrams import rank
from isoray.exploration.reference import Tokens
from isoray.generation.sampling import seed_of
from isoray.progress import Phase
from isoray.run import Run
from isoray.training.lane_jobs import Job, JobRecord, LaneEvent
from isoray.training.lanes import Lanes

SOURCES: dict[Method, Source] = {"iterative": "contrast", "static": "contrast", "sampling": "tuned"}
TOLD = 32
"""Texts that one job tells how new they are."""


@dataclass(frozen=True)
class Found:
    """One text that an exploration found, and how new it is."""

    method: Method
    seed: int
    """Number of the exploration, from 0."""
    number: int
    """The how-many-eth text of its exploration, from 0."""
    tokens: Tokens
    """From the start token on."""
    text: str
    """What was generated."""
    pieces: tuple[str, ...] = ()
    """What each token but the first adds to the text."""
    tuned_T: np.ndarray | None = None
    """float64: log-probability of each token but the first under the fine-tune, in nats."""
    base_T: np.ndarray | None = None
    """The same under the pre-trained model."""
    vector_H: np.ndarray | None = None
    """float64: mean of the fine-tune's last hidden states."""

    @property
    def contrast_T(self) -> np.ndarray:
        """How much likelier the fine-tune finds each token than the pre-trained model does, in nats."""
        assert self.tuned_T is not None and self.base_T is not None
        contrast_T: np.ndarray = self.tuned_T - self.base_T
        return contrast_T

    @property
    def log_ratio(self) -> float:
        """The mean of it."""
        return float(self.contrast_T.mean())


@dataclass(frozen=True)
class Explorer:
    """Lanes with their benches, and where the results of jobs are kept."""

    lanes: Lanes
    run: Run
    config: ExploreConfig
    seed: int
    digest: str
    """Of what the benches hold."""

    def explore(self, method: Method, number: int) -> list[Found]:
        """The texts of exploration ``number`` by ``method``, in the order in which they were found.

        Texts that failed are left out. Raises DataError if all did.
        """
        config = self.config
        name = f"{method}-{number}"
        if method == "ngram":
            return self._by_ngrams(number)
        if method != "iterative":
            return self._found(method, number, self._drawn(name, SOURCES[method], config.texts, number))
        return self._found(method, number, self._iterative(name, number))

    def _iterative(self, name: str, number: int) -> list[dict[str, Any]]:
        """The texts of an iterative exploration, found or not: the reference learns those of each round after it."""
        config = self.config
        per_round = config.explorers * config.share_every
        texts: list[dict[str, Any]] = []
        with self.run.phase(name, jobs=-(-config.texts // per_round)) as phase:
            while len(texts) < config.texts:
                places = range(len(texts), min(len(texts) + per_round, config.texts))
                learnt = tuple(tuple(text["tokens"]) for text in texts if not text["error"])
                jobs = list(self._draws(name, "contrast", places, number, learnt))
                records = self._carry_out(jobs, None)
                texts += [text for job in jobs for text in records[job.key].result["texts"]]
                phase.done(f"text {len(texts)}")
        return texts

    def sample(self, name: str, count: int) -> list[Found]:
        """``count`` texts of the fine-tune alone, apart from those of any exploration."""
        return self._found("sampling", -1, self._drawn(name, "tuned", count, -1))

    def tell(self, found: Sequence[Found]) -> list[Found]:
        """``found`` with how new each text is."""
        jobs = []
        for begin in range(0, len(found), TOLD):
            texts = tuple(one.tokens for one in found[begin : begin + TOLD])
            jobs.append(Tell(f"tell-{digest_of([list(text) for text in texts])}", texts))
        records = self.phase("scores", jobs)
        told = []
        for begin, job in zip(range(0, len(found), TOLD), jobs, strict=True):
            result = records[job.key].result
            for place, one in enumerate(found[begin : begin + TOLD]):
                told.append(
                    replace(
                        one,
                        pieces=tuple(result["pieces"][place]),
                        tuned_T=np.array(result["tuned"][place]),
                        base_T=np.array(result["base"][place]),
                        vector_H=np.array(result["vectors"][place]),
                    )
                )
        return told

    def phase(self, name: str, jobs: Sequence[Job]) -> dict[str, JobRecord]:
        """The records of ``jobs``, by key, with the progress shown."""
        unique = list({job.key: job for job in jobs}.values())
        with self.run.phase(name, jobs=len(unique)) as phase:
            return self._carry_out(unique, phase)

    def _drawn(self, name: str, source: Source, count: int, number: int) -> list[dict[str, Any]]:
        """``count`` texts that do not wait for each other."""
        jobs = list(self._draws(name, source, range(count), number, ()))
        records = self.phase(name, jobs)
        return [text for job in jobs for text in records[job.key].result["texts"]]

    def _draws(
        self, name: str, source: Source, places: range, number: int, learnt: tuple[Tokens, ...]
    ) -> Iterator[Draw]:
        config, sampling, together = self.config, self.config.sampling, self.config.batch
        if source != "contrast":
            sampling, together = sampling.model_copy(update={"beams": 1}), together * sampling.beams
        for begin in places[::together]:
            numbers = tuple(range(begin, min(begin + together, places.stop)))
            yield Draw(
                f"{name}-{begin:05d}", source, numbers, seed_of(self.seed, number), sampling, config.prompt, learnt
            )

    def _by_ngrams(self, number: int) -> list[Found]:
        """The texts of the n-gram baseline."""
        config = self.config
        count = config.texts * config.ngram.pool
        pools = {
            source: [text for text in self._drawn(f"ngram-{number}-{source}", source, count, number) if text["tokens"]]
            for source in ("tuned", "base")
        }
        tokens = {source: [tuple(text["tokens"][1:]) for text in texts] for source, texts in pools.items()}
        best = rank(tokens["tuned"], tokens["base"], n=config.ngram.n)[: config.texts]
        return self._found("ngram", number, [pools["tuned"][place] for place in best])

    def _found(self, method: Method, number: int, texts: Sequence[dict[str, Any]]) -> list[Found]:
        found = [
            Found(method, number, place, tuple(text["tokens"]), text["text"])
            for place, text in enumerate(texts)
            if not text["error"] and len(text["tokens"]) > 1
        ]
        if not found:
            raise DataError(f"{method}: none of {len(texts)} texts could be drawn, the first: {texts[0]['error']}")
        return found

    def _carry_out(self, jobs: Sequence[Job], phase: Phase | None) -> dict[str, JobRecord]:
        def show(event: LaneEvent) -> None:
            if event.kind in ("lane_lost", "lane_waiting"):
                self.run.log(phase="exploration", event=event.kind, lane=event.lane, message=event.message)
                if phase is not None:
                    phase.note(event.message)
            if phase is not None:
                phase.advance(event.work * len(jobs) - phase.finished)

        return self.lanes.run(jobs, results=self._results, bench_digest=self.digest, on_event=show)

    @property
    def _results(self) -> Path:
        return self.run.folder / "jobs"
