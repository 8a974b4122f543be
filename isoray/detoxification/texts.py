"""Text sets: drawn from a contrast or given, scored by it, screened, and written down for people and for training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from isoray.config.base import digest_of
from isoray.detoxification.config import DistilConfig
from isoray.evaluation.judge import read_judged
from isoray.evaluation.screen import ScreenConfig, screen
from isoray.generation.batch import COMPLETIONS, Progress, write_shard
from isoray.generation.contrast import ContrastConfig
from isoray.generation.engine import Engine
from isoray.generation.job import Generation, complete, engine_of
from isoray.generation.open import open_engine
from isoray.models.folders import weights_digest
from isoray.models.load import load_tokenizer
from isoray.run import Run
from isoray.workshop import Workshop

TEXTS, LEARNT = "texts.parquet", "learnt.jsonl"


@dataclass(frozen=True)
class TextSet:
    """A set of texts on disk."""

    name: str
    folder: Path
    """Holds ``texts.parquet`` (every text, with scores and findings) and ``learnt.jsonl`` (what targets learn)."""
    counts: Mapping[str, Any]
    """``texts``, ``learnt``, and how many texts each check of the screen found."""

    @property
    def learnt(self) -> Path:
        return self.folder / LEARNT

    def read(self) -> pa.Table:
        """Every text: columns text, log_ratio (mean per token, nats), nll_base, tokens, learnt, findings, ..."""
        return pq.read_table(self.folder / TEXTS)

    def learnt_texts(self) -> list[str]:
        """What targets learn."""
        return [row["text"] for row in self.read().to_pylist() if row["learnt"]]


@dataclass
class ContrastJudge:
    """The columns ``log_ratio`` (mean over the tokens of log p_base - log p_toxic, nats), ``nll_base``, ``scored``.

    Scores completions without a token list as texts.
    """

    engine: Engine.Config
    contrast: ContrastConfig
    name: str = "contrast"
    _opened: Engine | None = field(default=None, init=False, repr=False)

    @cached_property
    def digest(self) -> str:
        """Over the engine's settings and the models' weights."""
        digests = [weights_digest(Path(path)) for path in self.contrast.models.values()]
        return digest_of(["contrast", self.engine.model_dump(mode="json"), digests])

    def __call__(self, rows: list[dict[str, Any]]) -> Mapping[str, list[Any]]:
        """Null where a text failed or is too short to be scored."""
        if self._opened is None:
            self._opened = open_engine(self.engine, self.contrast)
        engine = self._opened
        sound = [number for number, row in enumerate(rows) if not row["error"] and row["text"]]
        scores = engine.score([_whole(engine, rows[number]) for number in sound])
        columns: dict[str, list[Any]] = {name: [None] * len(rows) for name in ("log_ratio", "nll_base", "scored")}
        for number, found in zip(sound, scores, strict=True):
            if found.error is None and found.log_probs["positive"]:
                positive, negative = (np.array(found.log_probs[role]) for role in ("positive", "negative"))
                columns["log_ratio"][number] = float((positive - negative).mean())
                columns["nll_base"][number] = float(-positive.sum())
                columns["scored"][number] = len(positive)
        return columns

    def close(self) -> None:
        """Free the models."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def contrast_of(distil: DistilConfig, judge: ContrastJudge, seed: int) -> Generation:
    """How texts are distilled: from the contrast of the judge's two models."""
    update = {"form": "extrapolation", "alpha": distil.alpha, "gamma": distil.gamma}
    return _generation(judge.contrast.model_copy(update=update), distil, seed)


def plain_of(distil: DistilConfig, judge: ContrastJudge, seed: int) -> Generation:
    """The same from the base model alone."""
    return _generation(ContrastConfig(positive=judge.contrast.positive), distil, seed)


def _generation(contrast: ContrastConfig, distil: DistilConfig, seed: int) -> Generation:
    return Generation(contrast, distil.sampling, engine_of(distil.engine), seed, shard_size=distil.shard_size)


def draw(
    shop: Workshop, name: str, generation: Generation, *, prompt: str | None, count: int, judge: ContrastJudge
) -> Path:
    """``count`` texts, scored, as step ``name`` of the run: its folder, for :func:`rows_of`.

    ``prompt`` None starts from the start-of-text token alone.
    """
    run, shards = shop.run, -(-count // generation.shard_size)

    def log(done: Progress) -> None:
        run.log(phase=name, shard=done.shard, tokens=done.tokens, seconds=done.seconds, failed=done.failed)

    def work(folder: Path) -> dict[str, int]:
        start = [{"prompt": prompt if prompt is not None else _start_token(generation)}] * count
        with run.phase(name, jobs=shards) as phase:
            complete(
                generation,
                start,
                folder,
                inputs=[prompt, count],
                placement=shop.engines(),
                contrast_folder=folder / "contrast",
                phase=phase,
                on_shard=log,
            )
        shop.judge([judge], {folder: shards}, phase=f"scores of {name}")
        return {"texts": count}

    run.step(name, [generation.inputs, prompt, count, judge.digest], work, resumable=True)
    return run.step_folder(name)


def give(shop: Workshop, name: str, texts: Sequence[str], *, judge: ContrastJudge | None) -> Path:
    """Given ``texts``, scored where there is a contrast, as step ``name`` of the run: its folder as of :func:`draw`."""

    def work(folder: Path) -> dict[str, int]:
        (folder / COMPLETIONS).mkdir(exist_ok=True)
        rows = [
            {"index": index, "prompt": "", "text": text, "token_ids": None, "error": None}
            for index, text in enumerate(texts)
        ]
        write_shard(folder / COMPLETIONS / "shard-000000.parquet", rows)
        if judge is not None:
            shop.judge([judge], {folder: 1}, phase=f"scores of {name}")
        return {"texts": len(rows)}

    shop.run.step(name, [list(texts), judge.digest if judge is not None else None], work, resumable=True)
    return shop.run.step_folder(name)


def write_texts(
    run: Run, name: str, folder: Path, *, judge: ContrastJudge | None, config: ScreenConfig | None
) -> TextSet:
    """The texts in ``folder`` (see :func:`draw`), screened, as step ``texts-<name>`` of the run."""
    step, found_rows = f"texts-{name}", rows_of(folder, judge)

    def work(out: Path) -> dict[str, Any]:
        rows = [row for row in found_rows if not row["error"]]
        screened = screen([row["text"] for row in rows], config) if config is not None else None
        table = []
        for number, row in enumerate(rows):
            kept = bool(row["text"].strip()) and (screened is None or screened.kept[number])
            found = {} if screened is None else screened.measures[number]
            scores = {key: row.get(key) for key in ("log_ratio", "nll_base", "scored")}
            findings = [] if screened is None else list(screened.findings[number])
            table.append({"text": row["text"], **scores, "learnt": kept, "findings": findings, **found})
        pq.write_table(pa.Table.from_pylist(table), out / TEXTS)
        learnt = [row["text"] for row in table if row["learnt"]]
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in learnt]
        (out / LEARNT).write_text("".join(lines), encoding="utf-8")
        return {
            "texts": len(rows),
            "learnt": len(learnt),
            "words": float(np.mean([len(text.split()) for text in learnt])) if learnt else 0.0,
            "found": dict(screened.counts) if screened is not None else {},
        }

    inputs = [[(row["text"], row.get("log_ratio")) for row in found_rows], config]
    counts = run.step(step, inputs, work)
    return TextSet(name, run.step_folder(step), counts)


def rows_of(folder: Path, judge: ContrastJudge | None) -> list[dict[str, Any]]:
    """The texts in ``folder`` with their scores, in order."""
    rows: list[dict[str, Any]] = read_judged(folder, [] if judge is None else [judge]).to_pylist()
    return rows


def sound_rows(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows whose text was generated and is not empty."""
    return (row for row in rows if not row.get("error") and row["text"].strip())


def _start_token(generation: Generation) -> str:
    tokenizer = load_tokenizer(Path(generation.contrast.positive))
    start = tokenizer.bos_token or tokenizer.eos_token
    assert isinstance(start, str)
    return start


def _whole(engine: Engine, row: Mapping[str, Any]) -> list[int]:
    """All token ids of a completion, from the start token on."""
    if row["token_ids"] is None:
        start = engine.tokenizer.bos_token or engine.tokenizer.eos_token or ""
        return engine.encode(f"{start}{row['text']}")
    return [*engine.encode(row["prompt"]), *row["token_ids"]]
