"""From corpora to block stores: plan, tokenise in tasks, select, pack in windows, commit.

What a store holds is a function of the files, the configuration and the tokenizer; how many workers there were, in what
order they worked, and how often the building was interrupted leave no trace in it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import isoray
from isoray.config.base import digest_of
from isoray.corpora.assemble import Assembly, assemble, finish, remove_scratch
from isoray.corpora.config import CorporaConfig, CorpusConfig
from isoray.corpora.documents import CorpusPlan, TaskReport, tokenise_task
from isoray.corpora.execute import Executor, Progress, carry_out, choose
from isoray.corpora.files import find_files
from isoray.corpora.manifest import MANIFEST
from isoray.corpora.splits import TASK_BYTES, plan_tasks
from isoray.corpora.store import BlockStore
from isoray.corpora.tokenise import Tokenizer
from isoray.corpora.windows import WINDOW_TOKENS, write_window
from isoray.errors import DataError

FORMAT = 1
"""Part of every store's key: raised when the same input no longer gives the same blocks."""
RAY_BYTES = 1 << 26
"""Input of so many bytes or more goes through Ray Data when `executor` is `auto`: a pipeline takes seconds to start."""


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
    folder, out = Path(tokenizer_folder).absolute(), Path(out).absolute()
    tokenizer = Tokenizer(folder, config)
    plans = [plan_corpus(corpus, config, tokenizer, out) for corpus in (*config.train, *config.test)]
    missing = list({plan.folder: plan for plan in plans if not _is_complete(plan.folder)}.values())
    if missing:
        chosen = choose(executor, sum(file.bytes for plan in missing for file in plan.files), RAY_BYTES)
        tokenising = Tokenise(missing, config, folder)
        results = carry_out(
            tokenising, len(tokenising.tasks), phase="tokenise", executor=chosen, workers=workers, progress=progress
        )
        reports: list[dict[int, TaskReport]] = [{} for _ in missing]
        for (plan, task), result in zip(tokenising.tasks, results, strict=True):
            reports[plan][task] = TaskReport.model_validate_json(result)
        packing = Pack([assemble(p, r, config, tokenizer) for p, r in zip(missing, reports, strict=True)])
        # Few windows are packed sooner than a second pipeline starts.
        where = chosen if len(packing.windows) > 2 * len(missing) else "inprocess"
        carry_out(packing, len(packing.windows), phase="pack", executor=where, workers=workers, progress=progress)
        for assembly in packing.assemblies:
            finish(assembly, config, tokenizer)
    stores = [BlockStore.open(plan.folder) for plan in plans]
    return Built(stores[: len(config.train)], stores[len(config.train) :])


def plan_corpus(corpus: CorpusConfig, config: CorporaConfig, tokenizer: Tokenizer, out: Path) -> CorpusPlan:
    """The files and tasks of ``corpus``, and the folder of its store, named after all that decides its content."""
    files = find_files(corpus, config)
    origin = {
        "format": FORMAT,
        "window": WINDOW_TOKENS,
        "task": TASK_BYTES,
        "version": isoray.__version__ if corpus.generator else "",
        "corpus": corpus.model_dump(mode="json", exclude={"path"}),
        "config": config.model_dump(mode="json", exclude={"root", "defaults", "train", "test"}),
        "tokenizer": tokenizer.digest,
        "files": [[file.label, file.format, file.bytes, file.modified] for file in files],
    }
    tasks = tuple(tuple(task) for task in plan_tasks(files, corpus))
    return CorpusPlan(corpus, tuple(files), tasks, out / f"{corpus.name}-{digest_of(origin)}")


def _is_complete(folder: Path) -> bool:
    """Whether the store is there; a damaged one is removed, to be built again."""
    if not (folder / MANIFEST).exists():
        return False
    try:
        BlockStore.open(folder)
    except DataError:
        shutil.rmtree(folder)
        return False
    remove_scratch(folder)
    return True


@dataclass
class Tokenise:
    """The work of tokenising: item i is the i-th of all corpora's tasks; the result is its report."""

    plans: list[CorpusPlan]
    config: CorporaConfig
    tokenizer_folder: Path
    tasks: list[tuple[int, int]] = field(init=False)
    """(number of the corpus, number of the task in it)."""

    def __post_init__(self) -> None:
        self.tasks = [(number, task) for number, plan in enumerate(self.plans) for task in range(len(plan.tasks))]
        self._tokenizer: Tokenizer | None = None

    def __call__(self, item: int) -> str:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.tokenizer_folder, self.config)
        plan, task = self.tasks[item]
        return tokenise_task(self.plans[plan], task, self._tokenizer).model_dump_json()


@dataclass
class Pack:
    """The work of packing: item i is the i-th of all corpora's windows; the result is its shard's report."""

    assemblies: list[Assembly]

    def __post_init__(self) -> None:
        self.windows = [window for assembly in self.assemblies for window in assembly.windows]

    def __call__(self, item: int) -> str:
        return write_window(self.windows[item]).model_dump_json()
