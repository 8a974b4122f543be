"""Reading a table of prompts: each row whole, in the order of the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from isoray.config.base import Config, ExistingPath
from isoray.corpora.config import Columns, CorporaConfig, CorpusConfig, Format, Scalar
from isoray.corpora.documents import CorpusPlan, position_of
from isoray.corpora.files import find_files
from isoray.corpora.read import BadRow, read_split
from isoray.corpora.rows import Document, Mapper
from isoray.corpora.splits import plan_tasks
from isoray.errors import DataError


class PromptsConfig(Config):
    """Where the prompts come from."""

    path: ExistingPath | None = None
    """File or folder: JSONL, Parquet, Arrow, CSV or text (a prompt per line), also compressed."""
    column: str = "prompt"
    """Column with the prompt; of text files, their lines."""
    texts: tuple[str, ...] = ()
    """The prompts themselves, used where there is no `path`. The tokenizer's start token, such as `<s>`, starts from
    nothing."""
    format: Format = "auto"
    """Format of the files; `auto` goes by their names."""
    where: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict)
    """Keep only rows that have this value, or one of these values, in this column."""
    limit: PositiveInt | None = None
    """Use so many prompts, drawn at random by the run's seed."""
    repeat: PositiveInt = 1
    """How many texts are generated for each prompt, each with a seed of its own."""

    @model_validator(mode="after")
    def _some_origin(self) -> Self:
        if self.path is None and not self.texts:
            raise ValueError("give `path` (a table of prompts) or `texts` (the prompts themselves)")
        return self


class TablePrompts(PromptsConfig):
    """A table of texts whose path hangs on the recipe's `root`, and is looked for when the run starts."""

    path: str | None = None
    """File or folder: JSONL, Parquet, Arrow, CSV or text (one per line), also compressed."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        if self.repeat != 1:
            raise ValueError("`repeat` is for generation; here each row of the table is used once")
        return self


def read_prompts(config: PromptsConfig, *, seed: int) -> Iterator[dict[str, Any]]:
    """Rows with ``prompt``, ``row`` (its number among the prompts used), ``repeat`` and the file's other columns.

    Raises DataError, with the place, for a row without a prompt or one that cannot be read.
    """
    rows = [{"prompt": text} for text in config.texts] if config.path is None else list(_rows(config))
    if not rows:
        raise DataError(f"{config.path} holds no prompts{' with ' + str(config.where) if config.where else ''}.")
    if config.limit is not None and config.limit < len(rows):
        chosen = np.random.Generator(np.random.Philox(seed)).permutation(len(rows))[: config.limit]
        rows = [rows[index] for index in sorted(chosen.tolist())]
    for number, row in enumerate(rows):
        for repeat in range(config.repeat):
            yield {**row, "row": number, "repeat": repeat}


def inputs_of(config: PromptsConfig) -> list[Any]:
    """What :func:`read_prompts` depends on, JSON-able: the settings, and the files' sizes and times."""
    files = find_files(_table(config), CorporaConfig()) if config.path is not None else []
    return [config.model_dump(mode="json"), [[file.label, file.bytes, file.modified] for file in files]]


def _table(config: PromptsConfig) -> CorpusConfig:
    return CorpusConfig(
        name="prompts",
        path=config.path,
        format=config.format,
        document="line",
        columns=Columns(text=config.column),
        where=config.where,
    )


def _rows(config: PromptsConfig) -> Iterator[dict[str, Any]]:
    column, corpus = config.column, _table(config)
    files = tuple(find_files(corpus, CorporaConfig()))
    if all(file.format == "text" for file in files):  # the one column of a text file has no other name
        column = "text"
        corpus = corpus.model_copy(update={"columns": Columns()})
    tasks = tuple(tuple(task) for task in plan_tasks(files, corpus))
    plan, mapper = CorpusPlan(corpus, files, tasks, Path()), Mapper(corpus)
    for split in (split for task in tasks for split in task):
        for row in read_split(files[split.file], split, corpus, lambda columns: columns):
            found = row if isinstance(row, BadRow) else mapper.document(row)
            if isinstance(found, Document) and not isinstance(row, BadRow):
                others = {name: value for name, value in row.values.items() if name != column}
                yield {**others, "prompt": found.text}
            elif found is not None:
                assert not isinstance(found, Document)
                where = position_of(plan, split, row.line)
                raise DataError(f"prompts: {where}: {found.detail}. Mend or remove it, or see `prompts.column`.")
