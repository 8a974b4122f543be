"""What a candidate does: its continuations of the evaluation's prompts, judged, and its answers to questions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from isoray.config.base import digest_of
from isoray.detoxification.config import CapabilityConfig, EvaluationConfig
from isoray.errors import DataError
from isoray.evaluation.judge import (
    Judge,
    PerplexityJudge,
    ToxicityJudge,
    read_judged,
)
from isoray.evaluation.multiple_choice import multiple_choice, read_questions
from isoray.evaluation.scorers.base import Scorer
from isoray.generation.contrast import ContrastConfig
from isoray.generation.engine import Engine
from isoray.generation.job import Generation, complete, engine_of
from isoray.generation.open import open_engine
from isoray.generation.prompts import PromptsConfig, inputs_of, read_prompts
from isoray.models.load import weights_digest
from isoray.workshop import Workshop

PROMPT = "given"
"""Column with the evaluation's prompt, without what a candidate puts before it."""


@dataclass(frozen=True)
class Candidate:
    """A way to generate that is measured: a target as it is, detoxified, or under a baseline."""

    target: str
    method: str
    """`base`, `unidetox` (with the text set's name where it was given), or a baseline's name."""
    contrast: ContrastConfig
    """Local folders."""
    preamble: str = ""

    @property
    def name(self) -> str:
        return f"{self.target}-{self.method}"


@dataclass(frozen=True)
class Measured:
    """A candidate's continuations with all judgements, and its answers."""

    candidate: Candidate
    rows: pa.Table
    """A row per continuation: set, group, row (the prompt's number), seed_number, given, text, error, and the judges'
    columns."""
    correct_Q: np.ndarray | None
    """bool: which questions were answered right."""


@dataclass(frozen=True)
class Measuring:
    """How candidates are measured: the same for all of a run."""

    config: EvaluationConfig
    prompts: Sequence[Mapping[str, Any]]
    """See :func:`evaluation_prompts`."""
    judges: Sequence[Judge]
    seed: int

    def measure(self, shop: Workshop, candidates: Sequence[Candidate]) -> list[Measured]:
        """Each candidate's continuations as step ``evaluate-<candidate>``, judged, and its answers as another.

        First all generate, then each judge goes over all of it, then all are asked: every model is loaded once.
        """
        folders = [self._generate(shop, one) for one in candidates]
        # Beside the steps, not part of them: another scorer must not cost the continuations.
        shop.judge(self.judges, dict.fromkeys(folders, self._shards), phase="judging")
        answers = self._ask(shop, candidates)
        found = []
        for one, folder in zip(candidates, folders, strict=True):
            rows = read_judged(folder, self.judges)
            _check(rows, one)
            found.append(Measured(one, rows, answers.get(one.name)))
        return found

    @property
    def _shards(self) -> int:
        return -(-len(self.prompts) // self.config.shard_size)

    def _generate(self, shop: Workshop, candidate: Candidate) -> Path:
        """The candidate's continuations: the folder of their step."""
        generation = Generation(
            candidate.contrast,
            self.config.sampling,
            engine_of(self.config.engine),
            self.seed,
            shard_size=self.config.shard_size,
        )
        step = f"evaluate-{candidate.name}"

        def work(folder: Path) -> dict[str, int]:
            prompts = [{**row, "prompt": candidate.preamble + row[PROMPT]} for row in self.prompts]
            with shop.run.phase(step, jobs=self._shards) as phase:
                complete(
                    generation,
                    prompts,
                    folder,
                    inputs=None,
                    placement=shop.engines(),
                    contrast_folder=folder / "contrast",
                    phase=phase,
                )
            return {"continuations": len(prompts)}

        inputs = [generation.inputs, candidate.preamble, digest_of(list(self.prompts))]
        shop.run.step(step, inputs, work, resumable=True)
        return shop.run.step_folder(step)

    def _ask(self, shop: Workshop, candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        """Which questions each candidate answers right, by its name: bool [Q].

        Without candidates that steer while they generate, whose probabilities of a given text no engine tells.
        """
        questions = self.config.capability
        if questions is None:
            return {}
        asked = [one for one in candidates if len(one.contrast.models) == 1]
        inputs = {one.name: self._asked(one, questions) for one in asked}
        missing = [one for one in asked if not shop.run.is_done(f"questions-{one.name}", inputs[one.name])]
        if missing:
            work = Ask(engine_of(self.config.engine), questions, self.seed, tuple(missing), shop.engines().cpus)
            for item, answers in shop.carry_out(work, len(missing), phase="questions"):
                name = missing[item].name
                _keep_answers(shop, name, inputs[name], json.loads(answers))
        return {name: np.array(_keep_answers(shop, name, given, None), np.bool_) for name, given in inputs.items()}

    def _asked(self, candidate: Candidate, questions: CapabilityConfig) -> list[Any]:
        """All that a candidate's answers depend on."""
        digests = [weights_digest(Path(path)) for path in candidate.contrast.models.values()]
        return [digests, candidate.preamble, questions, files_of(questions), self.config.engine, self.seed]


@dataclass(frozen=True)
class Ask:
    """The work of one worker: item i is which of the questions the i-th candidate answers right, as JSON."""

    engine: Engine.Config
    questions: CapabilityConfig
    seed: int
    candidates: tuple[Candidate, ...]
    threads: int

    def __call__(self, item: int) -> str:
        """The answers of candidate number ``item``."""
        torch.set_num_threads(self.threads)
        asked = self.candidates[item]
        with open_engine(self.engine, asked.contrast) as engine:
            answers = multiple_choice(engine, self.questions, seed=self.seed, preamble=asked.preamble)
        return json.dumps([bool(right) for right in answers.correct_Q])


def evaluation_prompts(config: EvaluationConfig, *, seed: int) -> list[dict[str, Any]]:
    """The prompts of all sets, each as often as it is continued: ``set``, ``group`` (empty where there is none),
    ``given``, ``row`` (the prompt's number over all sets), ``seed_number`` and ``repeat``.

    DataError for a group column that is not there, and for groups that are named but do not occur.
    """
    rows: list[dict[str, Any]] = []
    number = 0
    for name, prompts in config.prompts.items():
        groups: set[str] = set()
        for row in read_table(prompts, f"evaluation.prompts.{name}", seed=seed):
            if prompts.group is not None and prompts.group not in row:
                columns = ", ".join(sorted({prompts.column, *row} - {"prompt", "row", "repeat"}))
                raise DataError(
                    f"evaluation.prompts.{name}.group: no column {prompts.group!r}; columns found: {columns}"
                )
            found = row[prompts.group] if prompts.group is not None else None
            group = "" if found is None else str(found)
            groups.add(group)
            place = {"set": name, "group": group, PROMPT: row["prompt"], "row": number}
            rows += [
                {**place, "seed_number": turn, "repeat": repeat}
                for turn in range(config.seeds)
                for repeat in range(config.continuations)
            ]
            number += 1
        if unknown := sorted(set(prompts.out_of_domain or ()) - groups):
            known = ", ".join(sorted(groups - {""})) or "none, for no `group` column is named"
            raise DataError(
                f"evaluation.prompts.{name}.out_of_domain: no prompt is about {unknown[0]!r}; groups found: {known}"
            )
    return rows


def read_table(table: PromptsConfig, what: str, *, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of :func:`isoray.generation.prompts.read_prompts`, each once; ``what`` names the table in errors."""
    try:
        yield from read_prompts(table.model_copy(update={"repeat": 1}), seed=seed)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def check_questions(config: EvaluationConfig, *, seed: int) -> None:
    """DataError for questions that cannot be asked, before anything is computed for them."""
    if config.capability is None:
        return
    try:
        read_questions(config.capability, seed=seed)
    except DataError as error:
        raise DataError(f"evaluation.capability: {error}") from error


def files_of(questions: CapabilityConfig) -> list[Any]:
    """The sizes and times of the files that questions and examples are read from."""
    others = questions.shots_from.path if questions.shots_from else None
    paths = [questions.path, *([others] if others else [])]
    return [inputs_of(PromptsConfig(path=path, format=questions.format)) for path in paths]


def judges_of(config: EvaluationConfig, perplexity_model: Path) -> list[Judge]:
    """The toxicity scorers, and the model under which continuations get a perplexity."""
    judges: list[Judge] = []
    for name, scorer in config.scorers.items():
        assert isinstance(scorer, Scorer.Config)
        judges.append(ToxicityJudge(name, scorer))
    engine = engine_of(config.engine)
    return [*judges, PerplexityJudge(engine, str(perplexity_model), column=PROMPT)]


def _keep_answers(shop: Workshop, name: str, inputs: list[Any], answers: list[bool] | None) -> list[bool]:
    """The answers of a candidate as a step of the run; what was kept before, where they are None."""
    kept: list[bool] = shop.run.step(f"questions-{name}", inputs, lambda _: answers)
    return kept


def _check(rows: pa.Table, candidate: Candidate) -> None:
    errors = [error for error in rows["error"].to_pylist() if error]
    if len(errors) > len(rows) / 10:
        raise DataError(
            f"{candidate.name}: {len(errors)} of {len(rows)} prompts could not be answered, the first: {errors[0]}"
        )
