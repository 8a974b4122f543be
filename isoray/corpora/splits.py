"""Cutting the files of a corpus into tasks: a function of the files alone, never of how many workers there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from isoray.corpora.config import CorpusConfig
from isoray.corpora.files import InputFile, compression_of, open_bytes

TASK_BYTES = 1 << 24


@dataclass(frozen=True)
class Split:
    """A part of file number ``file``: rows that start in bytes [begin, end), or Parquet row groups [begin, end).

    ``end`` None: to the end of the file.
    """

    file: int
    begin: int = 0
    end: int | None = None


def plan_tasks(files: Sequence[InputFile], corpus: CorpusConfig, *, task_bytes: int = TASK_BYTES) -> list[list[Split]]:
    """The splits of ``files`` in order, gathered into tasks of about ``task_bytes`` of input each.

    A generated corpus is one task with one split of file 0.
    """
    if corpus.generator is not None:
        return [[Split(0)]]
    tasks: list[list[Split]] = [[]]
    held = 0
    for number, file in enumerate(files):
        for split, size in _splits(number, file, corpus, task_bytes):
            if tasks[-1] and held + size > task_bytes:
                tasks.append([])
                held = 0
            tasks[-1].append(split)
            held += size
    return [task for task in tasks if task]


def _splits(number: int, file: InputFile, corpus: CorpusConfig, task_bytes: int) -> Iterator[tuple[Split, int]]:
    """The splits of one file with their sizes in bytes."""
    by_lines = file.format == "jsonl" or (file.format == "text" and corpus.document == "line")
    if file.bytes <= task_bytes:
        yield Split(number), file.bytes
    elif by_lines and compression_of(file.url) is None:
        for begin in range(0, file.bytes, task_bytes):
            yield Split(number, begin, begin + task_bytes), min(task_bytes, file.bytes - begin)
    elif file.format == "parquet":
        yield from _row_groups(number, file, task_bytes)
    else:
        yield Split(number), file.bytes


def _row_groups(number: int, file: InputFile, task_bytes: int) -> Iterator[tuple[Split, int]]:
    try:
        with open_bytes(file.url) as stream:
            metadata = pq.ParquetFile(stream).metadata
    except (pa.ArrowInvalid, OSError):
        yield Split(number), file.bytes  # reading it will tell what is wrong
        return
    begin = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= task_bytes or group + 1 == metadata.num_row_groups:
            yield Split(number, begin, group + 1), size
            begin, size = group + 1, 0
