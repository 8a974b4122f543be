"""Tolerant readers: every row of a file comes out, as a row or as an account of what is wrong with it."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from isoray.corpora.config import CorpusConfig
from isoray.corpora.files import InputFile, open_bytes, open_decompressed
from isoray.corpora.splits import Split

BATCH_ROWS = 512
BOM = b"\xef\xbb\xbf"
BROKEN_STREAM = re.compile(r"truncat|inflate|decompress|corrupt|zlib|zstd|bz2|bzip|magic|invalid|footer", re.IGNORECASE)


class Row(NamedTuple):
    """A row as the file has it."""

    position: int
    """Where it is, unique in the file: byte offset, line or row number."""
    line: int
    """Line (text formats) or row (tables) in the split, counted from 1."""
    values: Mapping[str, Any]
    """Its columns."""


class BadRow(NamedTuple):
    """A row that cannot be read."""

    position: int
    line: int
    kind: str
    """What sort of fault: broken_json, not_an_object, not_utf8, wrong_fields, unclosed_quote, broken_file."""
    detail: str
    """The fault, in words."""
    raw: Any
    """What was found there."""


Selector = Callable[[list[str]], list[str]]
"""Given the columns of a table, those to read."""


def read_split(file: InputFile, split: Split, corpus: CorpusConfig, select: Selector) -> Iterator[Row | BadRow]:
    """All rows of ``split``, in order. A file that breaks off or cannot be decoded ends with a BadRow."""
    readers: dict[str, Callable[[], Iterator[Row | BadRow]]] = {
        "jsonl": lambda: _read_jsonl(file, split),
        "text": lambda: _read_text(file, split, corpus.document),
        "csv": lambda: _read_csv(file, corpus.delimiter),
        "parquet": lambda: _read_parquet(file, split, select),
        "arrow": lambda: _read_arrow(file, select),
    }
    last = Row(0, 0, {})
    try:
        for row in readers[file.format]():
            yield row
            last = Row(row.position, row.line, {})
    except (pa.ArrowInvalid, EOFError, OSError) as error:
        # Codecs report broken data as OSError without an errno; trouble with the storage itself has one.
        if isinstance(error, OSError) and (error.errno is not None or not BROKEN_STREAM.search(str(error))):
            raise
        yield BadRow(
            last.position + 1, last.line + 1, "broken_file", f"the file breaks off or is damaged: {error}", None
        )


@functools.lru_cache(maxsize=64)
def lines_before(file: InputFile, split: Split) -> int:
    """How many lines of a text file come before ``split``: what its line numbers are counted from."""
    if file.format not in ("jsonl", "text") or split.begin == 0:
        return 0
    count, left = 0, split.begin
    with open_decompressed(file.url) as stream:
        while left > 0 and (chunk := stream.read(min(left, 1 << 20))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    # The line that reaches across `begin` belongs to the split before, and is skipped by this one.
    return count + (0 if chunk.endswith(b"\n") else 1)


def _lines(file: InputFile, split: Split) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that start in the split."""
    with open_decompressed(file.url) as stream:
        offset = split.begin
        if offset:
            stream.seek(offset - 1)
            offset += len(stream.readline()) - 1
        while split.end is None or offset < split.end:
            line = stream.readline()
            if not line:
                return
            yield offset, line.removeprefix(BOM) if offset == 0 else line
            offset += len(line)


def _read_jsonl(file: InputFile, split: Split) -> Iterator[Row | BadRow]:
    for number, (offset, line) in enumerate(_lines(file, split), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except UnicodeDecodeError as error:
            yield BadRow(
                offset, number, "not_utf8", f"not UTF-8: {error.reason} at byte {error.start} of the line", line
            )
        except (ValueError, RecursionError) as error:
            yield BadRow(offset, number, "broken_json", f"not JSON: {error}", line)
        else:
            if isinstance(values, dict):
                yield Row(offset, number, values)
            else:
                found = "a JSON array" if isinstance(values, list) else f"the value {str(values)[:40]!r}"
                yield BadRow(offset, number, "not_an_object", f"one JSON object a line is expected, not {found}", line)


def _read_text(file: InputFile, split: Split, document: str) -> Iterator[Row | BadRow]:
    if document == "line":
        parts: Iterator[tuple[int, int, bytes]] = (
            (offset, number, line.rstrip(b"\r\n")) for number, (offset, line) in enumerate(_lines(file, split), start=1)
        )
    elif document == "paragraph":
        parts = _paragraphs(file, split)
    else:
        with open_decompressed(file.url) as stream:
            content = stream.read().removeprefix(BOM)
        parts = iter([(0, 1, content)] if content else [])
    for offset, number, part in parts:
        if not part.strip() and document != "file":
            continue
        try:
            yield Row(offset, number, {"text": part.decode()})
        except UnicodeDecodeError as error:
            yield BadRow(offset, number, "not_utf8", f"not UTF-8: {error.reason} at byte {error.start}", part)


def _paragraphs(file: InputFile, split: Split) -> Iterator[tuple[int, int, bytes]]:
    held: list[bytes] = []
    start = first = 0
    for number, (offset, line) in enumerate(_lines(file, split), start=1):
        if line.strip():
            if not held:
                start, first = offset, number
            held.append(line)
        elif held:
            yield start, first, b"".join(held).rstrip(b"\r\n")
            held = []
    if held:
        yield start, first, b"".join(held).rstrip(b"\r\n")


def _read_csv(file: InputFile, delimiter: str | None) -> Iterator[Row | BadRow]:
    csv.field_size_limit(sys.maxsize)
    if delimiter is None:
        delimiter = "\t" if ".tsv" in file.url.rpartition("/")[2].lower() else ","
    with open_decompressed(file.url) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                kind = "unclosed_quote" if "unexpected end" in str(error) else "wrong_fields"
                reason = "a quoted field never ends" if kind == "unclosed_quote" else str(error)
                yield BadRow(line, line, kind, reason, None)
                continue
            if fields is None:
                return
            if header is None:
                header = fields
            elif fields and len(fields) != len(header):
                detail = f"{len(fields)} fields, but the header has {len(header)}"
                yield BadRow(line, line, "wrong_fields", detail, fields)
            elif any(not _is_unicode(field) for field in fields):
                yield BadRow(line, line, "not_utf8", "not UTF-8", fields)
            elif fields:
                yield Row(line, line, dict(zip(header, fields, strict=True)))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(file: InputFile, split: Split, select: Selector) -> Iterator[Row | BadRow]:
    if file.bytes == 0:
        return
    with open_bytes(file.url) as stream:
        table = pq.ParquetFile(stream)
        columns = select(table.schema_arrow.names)
        end = table.metadata.num_row_groups if split.end is None else split.end
        first = sum(table.metadata.row_group(group).num_rows for group in range(split.begin))
        batches = table.iter_batches(BATCH_ROWS, row_groups=range(split.begin, end), columns=columns, use_threads=False)
        yield from _table_rows(batches, first)


def _read_arrow(file: InputFile, select: Selector) -> Iterator[Row | BadRow]:
    if file.bytes == 0:
        return
    with _open_arrow(file) as stream:
        start = stream.read(6)
        stream.seek(0)
        if start == b"ARROW1":
            reader = pa.ipc.open_file(stream)
            columns = select(reader.schema.names)
            batches = (reader.get_batch(i).select(columns) for i in range(reader.num_record_batches))
            yield from _table_rows(batches, 0)
        else:
            streamed = pa.ipc.open_stream(stream)
            columns = select(streamed.schema.names)
            yield from _table_rows((batch.select(columns) for batch in streamed), 0)


def _open_arrow(file: InputFile) -> BinaryIO:
    stream: BinaryIO = pa.memory_map(file.url) if "://" not in file.url else open_bytes(file.url)
    return stream


def _table_rows(batches: Iterator[pa.RecordBatch], first: int) -> Iterator[Row | BadRow]:
    number = first
    for whole in batches:
        for start in range(0, whole.num_rows, BATCH_ROWS):
            batch = whole.slice(start, BATCH_ROWS)
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:
                rows = [_decode_row(batch, index) for index in range(batch.num_rows)]
            for values in rows:
                number += 1
                if isinstance(values, bytes):
                    yield BadRow(number, number, "not_utf8", "not UTF-8", values)
                else:
                    yield Row(number, number, values)


def _decode_row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | bytes:
    """A row of the batch, or the bytes of the column that cannot be decoded."""
    values = {}
    for name in batch.schema.names:
        value = batch.column(name)[index]
        try:
            values[name] = value.as_py()
        except UnicodeDecodeError:
            return bytes(value.as_buffer())
    return values
