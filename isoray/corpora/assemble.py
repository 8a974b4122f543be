"""Between the halves of building: what the tasks report decides which documents are used and how they are grouped."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from isoray.corpora.config import CorporaConfig
from isoray.corpora.documents import CorpusPlan, Run, TaskReport, bad_row_message, runs_of
from isoray.corpora.duplicates import find_rows, set_aside
from isoray.corpora.execute import chunks
from isoray.corpora.manifest import FileReport
from isoray.corpora.select import Selection, select
from isoray.corpora.shards import commit_store, read_shard_report
from isoray.corpora.store import BlockStore
from isoray.corpora.tokenise import Tokenizer
from isoray.corpora.windows import WINDOW_TOKENS, Window, write_rest
from isoray.errors import DataError


@dataclass
class Assembly:
    """A corpus whose documents are tokenised and chosen, and only wait to be packed."""

    plan: CorpusPlan
    reports: Mapping[int, TaskReport]
    selection: Selection
    packed: bool
    licenses: dict[str, int]
    """Documents used, by licence."""
    windows: list[Window]


def assemble(
    plan: CorpusPlan, reports: Mapping[int, TaskReport], config: CorporaConfig, tokenizer: Tokenizer
) -> Assembly:
    """Choose the documents of a corpus and group them in windows.

    Raises DataError when a column is missing throughout, an id that must be unique is not, or nothing is left.
    """
    corpus = plan.corpus
    _check_columns(plan, reports)
    placed = runs_of(plan, reports)
    runs = [run for _, run in placed]
    has_prompts = any(bool(run.documents()["prompt"].any()) for run in runs)
    packed = config.packs(corpus, has_prompts=has_prompts)
    selection = select(
        runs,
        seed=config.seed,
        limit=corpus.limit,
        max_tokens=corpus.max_tokens,
        longest=None if packed else config.length,
        unique_ids=corpus.columns.id is not None,
    )
    _handle_duplicates(plan, runs, selection)
    names = list(dict.fromkeys(name for task in sorted(reports) for name in reports[task].licenses))
    used: Counter[str] = Counter()
    for (run, number), count in selection.licenses.items():
        used[reports[placed[run][0]].licenses[number]] += count
    if not sum(selection.kept.values()):
        raise DataError(_nothing_left(plan, reports, selection))
    groups = chunks(selection.tokens, WINDOW_TOKENS)
    windows = [
        Window(
            number=number,
            runs=tuple(runs[run] for run in group),
            duplicates=tuple(selection.duplicates.get(run) for run in group),
            licenses=tuple(
                {local: names.index(name) for local, name in enumerate(reports[placed[run][0]].licenses)}
                for run in group
            ),
            cut=selection.cut,
            seed=config.seed,
            shuffle=config.shuffle,
            length=config.length,
            packed=packed,
            prefix=len(tokenizer.prefix),
            keep_rest=len(groups) == 1 and config.remainder == "keep",
            vocab_size=tokenizer.vocab_size,
            folder=plan.folder,
        )
        for number, group in enumerate(groups)
    ]
    licenses = {name: used[name] for name in names}
    return Assembly(plan, reports, selection, packed, licenses, windows)


def finish(assembly: Assembly, config: CorporaConfig, tokenizer: Tokenizer) -> BlockStore:
    """Commit the store of a corpus all of whose windows are written, and remove what was only needed to build it."""
    plan, selection = assembly.plan, assembly.selection
    shards = [read_shard_report(plan.folder, window.number) for window in assembly.windows]
    if assembly.packed and len(assembly.windows) > 1:
        keep = config.remainder == "keep"
        shards.append(
            write_rest(
                plan.folder,
                len(assembly.windows),
                length=config.length,
                keep=keep,
                vocab_size=tokenizer.vocab_size,
            )
        )
    written = [shard for shard in shards if shard is not None]
    assert len(written) >= len(assembly.windows), "a window was not written"
    files = _file_reports(assembly)
    issues: Counter[str] = Counter()
    for file in files:
        issues.update(file.issues)
    store = commit_store(
        plan.folder,
        written,
        name=plan.corpus.name,
        key=plan.folder.name.rpartition("-")[2],
        documents=sum(selection.kept.values()),
        tokenizer=tokenizer.digest,
        packed=assembly.packed,
        length=config.length,
        dropped_tokens=sum(selection.tokens) - sum(shard.tokens for shard in written),
        truncated=selection.truncated,
        licenses=assembly.licenses,
        issues=dict(issues),
        files=tuple(files),
    )
    for task in range(len(plan.tasks)):
        quarantined = plan.task_folder(task) / "quarantine.jsonl"
        if quarantined.exists():
            (plan.folder / "quarantine").mkdir(exist_ok=True)
            shutil.copyfile(quarantined, plan.folder / "quarantine" / f"task-{task:05d}.jsonl")
    remove_scratch(plan.folder)
    return store


def remove_scratch(folder: Path) -> None:
    """Remove what is only needed while the store in ``folder`` is built, and what killed attempts left behind."""
    shutil.rmtree(folder / "documents", ignore_errors=True)
    for left in folder.glob(".*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _file_reports(assembly: Assembly) -> list[FileReport]:
    plan, selection = assembly.plan, assembly.selection
    out = []
    for number in range(max(1, len(plan.files))):
        parts = [report.files[number] for report in assembly.reports.values() if number in report.files]
        issues: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        for part in parts:
            issues.update(part.issues)
            notes.update(part.notes)
        if selection.too_short[number]:
            issues["too_short"] += selection.too_short[number]
        if selection.duplicated[number]:
            (issues if plan.corpus.columns.id is not None else notes)["duplicate_id"] += selection.duplicated[number]
        file = plan.files[number] if plan.files else None
        report = FileReport(
            path=file.label if file else f"generator:{plan.corpus.generator}",
            sha256="".join(part.sha256 for part in parts),
            bytes=file.bytes if file else 0,
            rows=sum(part.rows for part in parts),
            kept=selection.kept[number],
            filtered=sum(part.filtered for part in parts),
            sampled_out=selection.sampled_out[number],
            issues=dict(issues),
            notes=dict(notes),
        )
        accounted = report.kept + report.filtered + report.sampled_out + sum(report.issues.values())
        assert report.rows == accounted, f"{report.path}: {report.rows} rows were read, {accounted} are accounted for"
        out.append(report)
    return out


def _check_columns(plan: CorpusPlan, reports: Mapping[int, TaskReport]) -> None:
    """A column that not one row of a file has is a mistake in the configuration, however bad rows are treated."""
    for number in range(len(plan.files)):
        parts = [report.files[number] for report in reports.values() if number in report.files]
        rows = sum(part.rows for part in parts)
        if rows and sum(part.issues.get("missing_column", 0) for part in parts) == rows:
            raise DataError(f"corpus {plan.corpus.name!r}: {next(part.missing for part in parts if part.missing)}")


def _handle_duplicates(plan: CorpusPlan, runs: list[Run], selection: Selection) -> None:
    """Fail at, or set aside, the documents whose id an earlier one has, where ids must be unique."""
    if not selection.duplicates or plan.corpus.on_bad_row == "skip":
        return
    found = find_rows(plan, runs, selection.duplicates)
    if plan.corpus.on_bad_row == "fail":
        where, row = next(found)
        column = plan.corpus.columns.id or ""
        detail = f"the id {row.values.get(column)!r} (column {column!r}) was there before"
        raise DataError(bad_row_message(plan.corpus, where, detail))
    set_aside(plan, found)


def _nothing_left(plan: CorpusPlan, reports: Mapping[int, TaskReport], selection: Selection) -> str:
    files = [file for report in reports.values() for file in report.files.values()]
    rows, filtered = (sum(getattr(file, name) for file in files) for name in ("rows", "filtered"))
    bad = sum(sum(file.issues.values()) for file in files) + sum(selection.too_short.values())
    sampled = sum(selection.sampled_out.values())
    hint = ""
    if filtered == rows and rows:
        where = f"does `where: {plan.corpus.where}` name a value that is there, and " if plan.corpus.where else ""
        hint = f": {where}do min_chars and max_chars allow any?"
    elif sampled:
        hint = ": max_tokens is smaller than every document"
    return (
        f"corpus {plan.corpus.name!r} has no documents: {rows} rows in {len(plan.files)} files, {filtered} left out by "
        f"filters, {bad} bad, {sampled} not sampled{hint}"
    )
