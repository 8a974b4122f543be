"""From corpora to block stores: plan, tokenise in tasks, select, pack in windows, commit.

What a store holds is a function of the files, the configuration and the tokenizer; how many workers there were, in what
order they worked, and how often the building was interrupted leave no trace in it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from isoray.config.base import digest_of
from isoray.corpora.config import CorporaConfig, CorpusConfig
from isoray.corpora.documents import (
    CorpusPlan,
    TaskReport,
    bad_row_message,
    read_task_report,
    runs_of,
    tokenise_task,
)
from isoray.corpora.duplicates import set_aside
from isoray.corpora.execute import Executor, Progress, carry_out, choose, chunks
from isoray.corpora.files import find_files
from isoray.corpora.manifest import FileReport, ShardReport
from isoray.corpora.select import Selection, select
from isoray.corpora.shards import commit_store
from isoray.corpora.splits import plan_tasks
from isoray.corpora.store import BlockStore
from isoray.corpora.tokenise import Tokenizer
from isoray.corpora.windows import WINDOW_TOKENS, Window, write_rest, write_window
from isoray.errors import DataError

FORMAT = 1
"""Part of every store's key: to be raised when the same input no longer gives the same blocks."""
RAY_BYTES = 1 << 26
"""Input of so many bytes or more goes through Ray Data when `executor` is `auto`: its pipeline takes seconds to start."""


class Built(NamedTuple):
    """The stores of a run, in the order of the configuration."""

    train: list[BlockStore]
    test: list[BlockStore]


def build(
    config: CorporaConfig,
    tokenizer_folder: str | Path,
    out: str | Path,
    *,
    executor: Executor = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Built:
    """The block stores of all corpora of ``config`` in folders of ``out``; what is there already is not built again.

    With `ray` (connected by the caller; ``out`` must be on storage that all nodes see) tasks run as a Ray Data pipeline
    of ``workers`` single-CPU actors; with `inprocess` they run here. Both write the same bytes.
    Raises UserError and DataError for what is wrong with the configuration or the data, InfraError for lost workers.
    """
    tokenizer_folder, out = Path(tokenizer_folder).absolute(), Path(out).absolute()
    tokenizer = Tokenizer(tokenizer_folder, config)
    every = [*config.train, *config.test]
    plans = {corpus: _plan(corpus, config, tokenizer, out) for corpus in map(_Hashable, every)}
    todo = {plan.folder: plan for plan in plans.values() if not _is_complete(plan.folder)}
    built = _build_missing(list(todo.values()), config, tokenizer_folder, tokenizer, executor, workers, progress)
    stores = [
        built.get(plan.folder) or BlockStore.open(plan.folder) for plan in (plans[_Hashable(one)] for one in every)
    ]
    return Built(stores[: len(config.train)], stores[len(config.train) :])
