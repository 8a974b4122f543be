"""The first half of building: tasks read, check and tokenise, and leave runs of tokenised documents on disk.

A task's folder (``task-00000/``, appears in one rename) holds ``report.json``, ``tokens-000.npy`` and
``documents-000.npy`` for each run, and ``quarantine.jsonl``. A run ends after RUN_TOKENS tokens, which bounds memory
whatever the size of a file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from isoray.corpora.config import CorpusConfig
from isoray.corpora.files import InputFile, sha256_of
from isoray.corpora.manifest import Record
from isoray.corpora.read import BadRow, Row, lines_before, read_split
from isoray.corpora.rows import HUGE_CHARS, Document, Mapper, MissingColumn
from isoray.corpora.shards import atomic_folder, token_dtype
from isoray.corpora.splits import Split
from isoray.corpora.tokenise import Tokenizer
from isoray.errors import DataError

RUN_TOKENS = 1 << 22
BATCH_CHARS = 1 << 20
BATCH_DOCUMENTS = 2048
DOCUMENT = np.dtype(
    [
        ("key", "<u8"),  # hash of (file, position): orders and samples documents
        ("id", "<u8"),  # hash of the row's id; 0: it has none
        ("position", "<i8"),  # where it stands in the file
        ("file", "<u4"),  # number of the file in the manifest
        ("length", "<u4"),  # tokens
        ("prompt", "<u4"),  # how many of them are the prompt
        ("license", "<u2"),  # number of the licence in the manifest
        ("digest", "V16"),  # BLAKE2b of prompt and text
    ]
)


@dataclass(frozen=True)
class CorpusPlan:
    """What every task of a corpus needs to know."""

    corpus: CorpusConfig
    files: tuple[InputFile, ...]
    tasks: tuple[tuple[Split, ...], ...]
    folder: Path
    """Where the corpus's store is built."""

    def task_folder(self, number: int) -> Path:
        """Folder of task ``number``."""
        return self.folder / "documents" / f"task-{number:05d}"


class FileCounts(Record):
    """What a task found in one file."""

    sha256: str = ""
    """Of the whole file; told by the task that reads its beginning."""
    rows: int = 0
    """Rows, good or bad."""
    filtered: int = 0
    """Rows left out by filters."""
    issues: dict[str, int] = Field(default_factory=dict)
    """Bad rows by kind."""
    notes: dict[str, int] = Field(default_factory=dict)
    """What is worth knowing, by kind."""
    missing: str = ""
    """The first complaint about a missing column."""


class TaskReport(Record):
    """What a task did."""

    files: dict[int, FileCounts]
    """By number of the file."""
    licenses: tuple[str, ...]
    """Licences that the runs' documents refer to."""
    runs: tuple[tuple[int, int], ...]
    """Documents and tokens of each run."""


@dataclass
class _Counts:
    rows: int = 0
    filtered: int = 0
    issues: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    missing: str = ""


def tokenise_task(plan: CorpusPlan, number: int, tokenizer: Tokenizer) -> TaskReport:
    """Read, check and tokenise task ``number``; done already, only its report is read.

    Raises DataError at the first bad row where the corpus says `fail`.
    """
    final = plan.task_folder(number)
    if (final / "report.json").exists():
        return read_task_report(plan, number)
    with atomic_folder(final) as scratch:
        writer = _RunWriter(scratch, tokenizer)
        counts: dict[int, _Counts] = {}
        digests: dict[int, str] = {}
        for split in plan.tasks[number]:
            held = counts.setdefault(split.file, _Counts())
            writer.add(split.file, read_documents(plan, split, held, quarantine=scratch / "quarantine.jsonl"), plan)
            if plan.files and split.begin == 0:
                digests[split.file] = sha256_of(plan.files[split.file].url)
        report = TaskReport(
            files={
                file: FileCounts(
                    sha256=digests.get(file, ""),
                    rows=held.rows,
                    filtered=held.filtered,
                    issues=dict(held.issues),
                    notes=dict(held.notes),
                    missing=held.missing,
                )
                for file, held in counts.items()
            },
            runs=tuple(writer.close()),
            licenses=tuple(writer.licenses),
        )
        (scratch / "report.json").write_text(report.model_dump_json(), encoding="utf-8")
    return report


def read_task_report(plan: CorpusPlan, number: int) -> TaskReport:
    """The report of a finished task."""
    return TaskReport.model_validate_json((plan.task_folder(number) / "report.json").read_text(encoding="utf-8"))


def read_documents(
    plan: CorpusPlan, split: Split, counts: _Counts | None = None, *, quarantine: Path | None = None
) -> Iterator[Document]:
    """The documents of ``split``; what else was found goes into ``counts`` and ``quarantine``.

    Raises DataError at the first bad row where the corpus says `fail`.
    """
    corpus = plan.corpus
    counts = counts if counts is not None else _Counts()
    mapper = Mapper(corpus)
    for row in raw_rows(plan, split, mapper):
        counts.rows += 1
        found = row if isinstance(row, BadRow) else mapper.document(row)
        if found is None:
            counts.filtered += 1
        elif isinstance(found, Document):
            if len(found.text) + len(found.prompt or "") >= HUGE_CHARS:
                counts.notes["huge_document"] += 1
            yield found
        else:
            if corpus.on_bad_row == "fail":
                raise DataError(bad_row_message(corpus, position_of(plan, split, row.line), found.detail))
            counts.issues[found.kind] += 1
            if found.kind == "missing_column" and not counts.missing:
                counts.missing = f"{position_of(plan, split, row.line)}: {found.detail}"
            if corpus.on_bad_row == "quarantine" and quarantine is not None:
                raw = row.raw if isinstance(row, BadRow) else row.values
                write_quarantine(quarantine, position_of(plan, split, row.line), found.kind, found.detail, raw)
    if plan.files and plan.files[split.file].bytes == 0:
        counts.notes["empty_file"] += 1


def bad_row_message(corpus: CorpusConfig, where: str, detail: str) -> str:
    """What a person is told about a bad row."""
    return (
        f"corpus {corpus.name!r}: {where}: {detail}. Mend or remove it, or set `on_bad_row: skip` (left out and "
        "counted) or `quarantine` (also set aside in a file) for this corpus"
    )


def raw_rows(plan: CorpusPlan, split: Split, mapper: Mapper | None = None) -> Iterator[Row | BadRow]:
    """The rows of ``split`` as they stand in the file; of tables only the columns that are used."""
    if plan.corpus.generator is not None:
        from isoray.corpora.synthetic import generate

        for number, values in enumerate(generate(plan.corpus.generator, **plan.corpus.options), start=1):
            yield Row(number, number, values)
        return
    mapper = mapper or Mapper(plan.corpus)
    try:
        yield from read_split(plan.files[split.file], split, plan.corpus, mapper.select)
    except MissingColumn as error:
        raise DataError(f"corpus {plan.corpus.name!r}: {plan.files[split.file].url}: {error}") from error


def position_of(plan: CorpusPlan, split: Split, line: int) -> str:
    """Where ``line`` of ``split`` is, in words: the file, and the line or row in it."""
    if not plan.files:
        return f"generator {plan.corpus.generator}, row {line}"
    file = plan.files[split.file]
    unit = "line" if file.format in ("jsonl", "text", "csv") else "row"
    return f"{file.url}, {unit} {line + lines_before(file, split)}"


def write_quarantine(path: Path, where: str, kind: str, detail: str, raw: Any) -> None:
    """Append a bad row to a JSONL file; what is not text is written as Python would show it."""
    if isinstance(raw, bytes):
        raw = raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
    entry = {"where": where, "kind": kind, "detail": detail, "row": raw}
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(entry, default=str) + "\n")


class _RunWriter:
    """Tokenises documents in batches and writes them as runs."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.licenses: dict[str, int] = {}
        self.runs: list[tuple[int, int]] = []
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._tokens: list[npt.NDArray[Any]] = []
        self._records: list[npt.NDArray[Any]] = []
        self._held = 0

    def add(self, file: int, documents: Iterator[Document], plan: CorpusPlan) -> None:
        label = plan.files[file].label if plan.files else ""
        batch: list[Document] = []
        chars = 0
        for document in documents:
            batch.append(document)
            chars += len(document.text) + len(document.prompt or "")
            if chars >= BATCH_CHARS or len(batch) >= BATCH_DOCUMENTS:
                self._tokenise(file, label, batch)
                batch, chars = [], 0
        self._tokenise(file, label, batch)

    def close(self) -> list[tuple[int, int]]:
        """Write what is left; returns the documents and tokens of each run."""
        if self._records:
            tokens, records = np.concatenate(self._tokens), np.concatenate(self._records)
            np.save(self.folder / f"tokens-{len(self.runs):03d}.npy", tokens)
            np.save(self.folder / f"documents-{len(self.runs):03d}.npy", records)
            self.runs.append((len(records), len(tokens)))
        self._tokens, self._records, self._held = [], [], 0
        return self.runs

    def _tokenise(self, file: int, label: str, batch: Sequence[Document]) -> None:
        if not batch:
            return
        encoded = self.tokenizer.encode(batch)
        records = np.zeros(len(batch), DOCUMENT)
        records["file"] = file
        records["length"] = encoded.lengths
        records["prompt"] = encoded.prompts
        records["position"] = [document.position for document in batch]
        records["key"] = [document_key(label, document.position) for document in batch]
        records["id"] = [0 if document.id is None else _hash64(document.id) | 1 for document in batch]
        records["license"] = [self.licenses.setdefault(document.license, len(self.licenses)) for document in batch]
        records["digest"] = np.frombuffer(b"".join(map(_digest16, batch)), "V16")
        self._tokens.append(encoded.tokens.astype(self._dtype))
        self._records.append(records)
        self._held += len(encoded.tokens)
        if self._held >= RUN_TOKENS:
            self.close()


def document_key(label: str, position: int) -> int:
    """64 bits that stand for a document in all random choices: a hash of where it stands."""
    return _hash64(f"{label}\0{position}")


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="backslashreplace"), digest_size=8).digest(), "little")


def _digest16(document: Document) -> bytes:
    content = document.text if document.prompt is None else f"{document.prompt}\0{document.text}"
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Run:
    """A run on disk."""

    tokens_path: Path
    documents_path: Path

    def documents(self) -> npt.NDArray[Any]:
        """DOCUMENT records, in the order of the input."""
        records: npt.NDArray[Any] = np.load(self.documents_path)
        return records

    def tokens(self) -> npt.NDArray[Any]:
        """The documents' tokens, one after the other, mapped into memory."""
        return np.asarray(np.load(self.tokens_path, mmap_mode="r"))


def runs_of(plan: CorpusPlan, reports: Mapping[int, TaskReport]) -> list[tuple[int, Run]]:
    """(task, run) in the order of the input."""
    return [
        (
            task,
            Run(
                plan.task_folder(task) / f"tokens-{number:03d}.npy",
                plan.task_folder(task) / f"documents-{number:03d}.npy",
            ),
        )
        for task in range(len(plan.tasks))
        for number in range(len(reports[task].runs))
    ]
