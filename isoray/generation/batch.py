"""Generation for a table of prompts, on a pool of engines: shards of prompts in, shards of completions out.

The unit of work is a shard: a fixed slice of the prompts, which one engine answers from beginning to end and writes as
one Parquet file that appears whole or not at all. So a second start answers what is missing and nothing twice, and a
shard's content is a function of its prompts and seeds alone, whoever computes it and whatever was computed before.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from isoray.config.base import digest_of
from isoray.corpora.execute import as_done
from isoray.errors import DataError
from isoray.generation.contrast import ContrastConfig
from isoray.generation.engine import Completion, Engine, Request
from isoray.generation.open import open_engine
from isoray.generation.sampling import SamplingConfig, seed_of
from isoray.run import storage_errors, write_json

PROMPTS, COMPLETIONS = "prompts", "completions"
ADDED = ("index", "seed", "text", "token_ids", "log_probs", "finish", "error", "prompt_tokens")
"""Columns that completions have beside those of their prompts."""
TYPES = {"token_ids": pa.list_(pa.int32()), "log_probs": pa.list_(pa.float32()), "error": pa.string()}
"""Of columns whose type cannot be told from every shard's rows, or would be wider than need be."""


@dataclass(frozen=True)
class Progress:
    """What is done of a batch."""

    shard: int
    shards: int
    done: int
    prompts: int
    """Answered so far in this start, failed ones included."""
    failed: int
    tokens: int
    """New tokens, of this start."""
    seconds: float
    """Since this start."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all engines together per second."""
        return self.tokens / max(self.seconds, 1e-9)


def stage_prompts(prompts: Iterable[Mapping[str, Any]], folder: Path, *, shard_size: int, inputs: object) -> int:
    """Write ``prompts`` as numbered shards of ``shard_size`` rows under ``folder/prompts``; how many there are.

    ``prompts`` are rows with a column `prompt` (a text, or a list of token ids) and any others: a list, a generator, a
    Ray Dataset (its rows in order). ``inputs`` (JSON-able) is what they are made from: prompts that are staged already
    with the same inputs are used, others replaced together with their completions. Raises DataError for rows that lack
    a prompt or have a column that the completions add, and for none.
    """
    marker = folder / PROMPTS / "staged.json"
    digest = digest_of([inputs, shard_size])
    if marker.is_file() and (found := json.loads(marker.read_text(encoding="utf-8")))["inputs"] == digest:
        return int(found["shards"])
    with storage_errors(folder):
        for name in (PROMPTS, COMPLETIONS):
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir(parents=True)
        rows: Iterator[Any] = iter(prompts.iter_rows() if hasattr(prompts, "iter_rows") else prompts)
        count = shards = 0
        while block := list(islice(rows, shard_size)):
            for number, row in enumerate(block, start=count):
                _check_row(row, number)
            write_shard(_shard(folder / PROMPTS, shards), [{"index": count + i, **row} for i, row in enumerate(block)])
            count, shards = count + len(block), shards + 1
        if not count:
            raise DataError("there are no prompts")
        write_json(marker, {"inputs": digest, "shards": shards, "prompts": count})
    return shards


def missing_shards(folder: Path, shards: int) -> list[int]:
    """The shards that have not been answered."""
    return [shard for shard in range(shards) if not _shard(folder / COMPLETIONS, shard).is_file()]


@dataclass
class AnswerShard:
    """The work of one engine: read a shard of prompts, answer it, write it. Opens its engine when it gets the first."""

    engine: Engine.Config
    contrast: ContrastConfig
    sampling: SamplingConfig
    folder: Path
    seed: int
    shards: tuple[int, ...]
    threads: int | None = None
    """Compute threads of torch's CPU kernels, which the last bits of results depend on; None: as the process has it."""
    _opened: Engine | None = field(default=None, init=False, repr=False)

    def __call__(self, item: int) -> str:
        """Answer shard ``shards[item]``; counts as JSON."""
        if self._opened is None:
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            self._opened = open_engine(self.engine, self.contrast)
        shard = self.shards[item]
        rows = pq.read_table(_shard(self.folder / PROMPTS, shard)).to_pylist()
        requests = [
            Request(str(row["index"]), row["prompt"], self.sampling, seed_of(self.seed, row["index"])) for row in rows
        ]
        completions = answer(self._opened, requests)
        answered = [
            _answered(row, request, completions[request.id]) for row, request in zip(rows, requests, strict=True)
        ]
        write_shard(_shard(self.folder / COMPLETIONS, shard), answered)
        failed, tokens = sum(bool(row["error"]) for row in answered), sum(len(row["token_ids"]) for row in answered)
        return json.dumps({"failed": failed, "tokens": tokens, "prompts": len(rows)})

    def close(self) -> None:
        """Free the engine."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def answer_missing(
    work: Callable[[tuple[int, ...]], AnswerShard],
    folder: Path,
    shards: int,
    *,
    executor: Literal["ray", "inprocess"],
    engines: int = 1,
    cpus: float = 1,
    gpus: float = 0,
) -> Iterator[Progress]:
    """Answer what is missing of ``shards`` staged shards with ``engines`` engines, each with ``cpus`` and ``gpus``.

    ``work`` makes the work from the shards to answer. With `ray`, Ray must be connected; several engines on one node,
    or on one GPU (a fraction of it each), are a matter of these numbers. Whoever stops iterating stops the work after
    the shards under way.
    """
    missing = tuple(missing_shards(folder, shards))
    started, prompts, failed, tokens = time.perf_counter(), 0, 0, 0
    if not missing:
        return
    answering = work(missing)
    done = as_done(
        answering, len(missing), phase="generation", executor=executor, workers=engines, cpus=cpus, gpus=gpus
    )
    try:
        for count, (item, result) in enumerate(done, start=shards - len(missing) + 1):
            counts = json.loads(result)
            prompts, failed, tokens = prompts + counts["prompts"], failed + counts["failed"], tokens + counts["tokens"]
            yield Progress(missing[item], shards, count, prompts, failed, tokens, time.perf_counter() - started)
    finally:
        answering.close()


def answer(engine: Engine, requests: Iterable[Request]) -> dict[str, Completion]:
    """The completions of ``requests`` by their ids, from an engine without other requests."""
    for request in requests:
        engine.add(request)
    completions: dict[str, Completion] = {}
    while engine.busy:
        completions |= {delta.id: delta.completion for delta in engine.step() if delta.completion is not None}
    return completions


def read_completions(folder: Path) -> pa.Table:
    """All completions under ``folder``, in the order of their prompts."""
    files = sorted((folder / COMPLETIONS).glob("shard-*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files], promote_options="permissive")


def write_shard(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a Parquet file that appears whole or not at all."""
    table = pa.Table.from_pylist(rows)
    for name, kind in TYPES.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with storage_errors(path):
        try:
            with partial.open("wb") as file:
                pq.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _check_row(row: Mapping[str, Any], number: int) -> None:
    if row.get("prompt") is None:
        raise DataError(f"row {number} of the prompts has no `prompt`; it has {', '.join(map(repr, row)) or 'nothing'}")
    if taken := [name for name in ADDED if name in row]:
        raise DataError(f"row {number} of the prompts has a column {taken[0]!r}, which completions add; rename it")


def _answered(row: dict[str, Any], request: Request, completion: Completion) -> dict[str, Any]:
    return {
        **row,
        "seed": request.seed,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "log_probs": list(completion.log_probs),
        "finish": completion.finish,
        "error": completion.error,
        "prompt_tokens": completion.prompt_tokens,
    }


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.parquet"
