"""Reading: every row of every format comes out, wherever a file is cut, and what is broken is told where it stands."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isoray.corpora.config import CorporaConfig, CorpusConfig
from isoray.corpora.files import InputFile, find_files, sha256_of
from isoray.corpora.read import BadRow, Row, lines_before, read_split
from isoray.corpora.rows import Document, Fault, Mapper, MissingColumn
from isoray.corpora.splits import Split, plan_tasks
from isoray.errors import InfraError, UserError

ROWS = [{"text": f"Zeile {i} \u00e4\u732b " + "x" * (i % 7), "n": i} for i in range(60)]


def corpus_at(path: Path | str, **fields: Any) -> CorpusConfig:
    return CorpusConfig.model_validate({"name": "c", "path": str(path), **fields})


def read_all(path: Path | str, *, task_bytes: int = 1 << 20, **fields: Any) -> list[Row | BadRow]:
    corpus = corpus_at(path, **fields)
    files = find_files(corpus, CorporaConfig())
    return [
        row
        for task in plan_tasks(files, corpus, task_bytes=task_bytes)
        for split in task
        for row in read_split(files[split.file], split, corpus, lambda columns: columns)
    ]


def values(rows: list[Row | BadRow]) -> list[Any]:
    return [dict(row.values) if isinstance(row, Row) else row.kind for row in rows]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_table(path: Path, kind: str) -> None:
    table = pa.Table.from_pylist(ROWS)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=7)
        return
    with pa.OSFile(str(path), "wb") as out:
        new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with new(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)


@pytest.mark.parametrize("task_bytes", [1, 64, 100, 1 << 20])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_lines_do_not_depend_on_where_a_file_is_cut(tmp_path: Path, task_bytes: int, ending: bytes) -> None:
    content = jsonl(ROWS).replace(b"\n", ending)
    (tmp_path / "a.jsonl").write_bytes(content[: -len(ending)])  # the last line ends with the file
    found = read_all(tmp_path / "a.jsonl", task_bytes=task_bytes)
    assert values(found) == ROWS
    assert len({row.position for row in found}) == len(ROWS)


def test_every_byte_of_a_file_may_be_a_border(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(ROWS[:6]))
    corpus = corpus_at(path)
    (file,) = find_files(corpus, CorporaConfig())
    for border in range(1, file.bytes):
        splits = [Split(0, 0, border), Split(0, border, None)]
        rows = [[*read_split(file, split, corpus, list)] for split in splits]
        assert values([row for part in rows for row in part]) == ROWS[:6]
        numbers = [
            lines_before(file, split) + row.line for split, part in zip(splits, rows, strict=True) for row in part
        ]
        assert numbers == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".zst"])
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    content = jsonl(ROWS)
    packed = {
        "": lambda: content,
        ".gz": lambda: gzip.compress(content[:1000]) + gzip.compress(content[1000:]),
        ".bz2": lambda: bz2.compress(content),
        ".zst": lambda: pa.compress(content, codec="zstd", asbytes=True),
    }[suffix]()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed)
    assert values(read_all(tmp_path / f"a.jsonl{suffix}", task_bytes=100)) == ROWS


@pytest.mark.parametrize("task_bytes", [1, 1 << 20])
@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_tables(tmp_path: Path, kind: str, task_bytes: int) -> None:
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    write_table(path, kind)
    found = read_all(path, task_bytes=task_bytes)
    assert values(found) == ROWS
    assert [row.position for row in found] == list(range(1, 61))


def test_csv_with_everything_that_csv_allows(tmp_path: Path) -> None:
    rows = [{"a": 'quoted "x"', "b": "two\nlines"}, {"a": "", "b": "comma, here"}, {"a": "\u732b", "b": "z" * 300_000}]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as out:
        writer = csv.DictWriter(out, ["a", "b"])
        writer.writeheader()
        writer.writerows(rows)
    found = read_all(tmp_path / "a.csv")
    assert values(found) == rows
    assert [row.line for row in found] == [2, 4, 5]
    (tmp_path / "a.tsv").write_text("a\tb\n1,5\t2\n")
    assert values(read_all(tmp_path / "a.tsv")) == [{"a": "1,5", "b": "2"}]


def test_text_by_file_line_and_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n\n \nthree\nfour")
    texts = {
        how: [row["text"] for row in values(read_all(tmp_path / "a.txt", document=how))]
        for how in ("file", "line", "paragraph")
    }
    assert texts == {
        "file": ["one\ntwo\n\n \nthree\nfour"],
        "line": ["one", "two", "three", "four"],
        "paragraph": ["one\ntwo", "three\nfour"],
    }


def test_broken_lines_are_told_apart_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "half',
        b'{"text": "\xff\xfe"}',
        b'["a", "list"]',
        b"",
        b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"text": "also good"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = read_all(tmp_path / "a.jsonl")
    kinds = ["broken_json", "not_utf8", "not_an_object", "broken_json", "broken_json"]
    assert values(found) == [{"text": "good"}, *kinds, {"text": "also good"}]
    assert [row.line for row in found] == [1, 2, 3, 4, 6, 7, 8]


def test_broken_csv_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,2\n3\n\n\xff,4\n"x"y,5\n6,7\n"never ends,8\n9,10\n')
    found = read_all(tmp_path / "a.csv")
    good = [{"a": "1", "b": "2"}, {"a": "6", "b": "7"}]
    assert values(found) == [good[0], "wrong_fields", "not_utf8", "wrong_fields", good[1], "unclosed_quote"]
    assert [row.line for row in found] == [2, 3, 5, 6, 7, 8]


def test_a_compressed_file_that_breaks_off(tmp_path: Path) -> None:
    rows = [{"text": os.urandom(50).hex()} for _ in range(2000)]
    for suffix, packed in [(".gz", gzip.compress(jsonl(rows))), (".bz2", bz2.compress(jsonl(rows)))]:
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(packed[: len(packed) // 2])
        *good, last = values(read_all(path))
        assert last == "broken_file"
        if suffix == ".gz":
            assert len(good) > 300 and good == rows[: len(good)]
        path.write_bytes(b"not compressed at all" * 10)
        assert values(read_all(path)) == ["broken_file"]


def test_broken_tables(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"nothing of the sort" * 100)
        assert values(read_all(tmp_path / name)) == ["broken_file"]
    broken = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "b.parquet")
    assert values(read_all(tmp_path / "b.parquet")) == [{"text": "good"}, "not_utf8", {"text": "fine"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "a.arrow", "a.txt"])
def test_empty_files_have_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert read_all(tmp_path / name) == []


def test_folders_globs_and_lists(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.jsonl", "a.jsonl.gz", "README.md", ".hidden.jsonl", "b/_SUCCESS"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def labels(path: Any) -> list[str]:
        corpus = CorpusConfig.model_validate({"name": "c", "path": path})
        return [file.label for file in find_files(corpus, CorporaConfig(root=str(tmp_path)))]

    assert labels(".") == ["a.jsonl.gz", "b/1.jsonl", "b/2.jsonl"]
    assert labels("b/*.jsonl") == ["1.jsonl", "2.jsonl"]
    assert labels("**/*.jsonl") == ["b/1.jsonl", "b/2.jsonl"]
    assert labels(["b/2.jsonl", "a.jsonl.gz", "b/2.jsonl"]) == ["2.jsonl", "a.jsonl.gz"]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "2.jsonl").touch()
    assert labels(["b/2.jsonl", "d"]) == ["0/2.jsonl", "1/2.jsonl"]
    (tmp_path / "d" / "2.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no 'c'; one of: .*a\.jsonl\.gz, b"):
        labels("c/1.jsonl")
    with pytest.raises(UserError, match=r"did you mean 'a\.jsonl\.gz'"):
        labels("a.jsonl.gx")
    with pytest.raises(UserError, match="no file matches"):
        labels("*.parquet")
    with pytest.raises(UserError, match="no known suffix"):
        labels("README.md")
    (tmp_path / "c.csv").touch()
    with pytest.raises(UserError, match="several formats"):
        labels(".")


def test_remote_files(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpora/x/a.jsonl", jsonl(ROWS))
    memory.pipe("/corpora/x/b.jsonl.gz", gzip.compress(jsonl(ROWS)))
    for path in ("memory://corpora/x", "memory://corpora/x/*"):
        assert values(read_all(path, task_bytes=100)) == ROWS + ROWS
    corpus = CorpusConfig(name="c", path="x")
    files = find_files(corpus, CorporaConfig(root="memory://corpora"))
    (tmp_path / "a").write_bytes(jsonl(ROWS))
    assert sha256_of(files[0].url) == sha256_of(str(tmp_path / "a"))
    with pytest.raises(UserError, match="did you mean 'x'"):
        find_files(CorpusConfig(name="c", path="memory://corpora/xx"), CorporaConfig())
    with pytest.raises(UserError, match="cannot open nosuch://"):
        find_files(CorpusConfig(name="c", path="nosuch://x"), CorporaConfig())


def test_folders_of_the_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "plain", num_shards=3)
    datasets.DatasetDict({"train": whole, "test": whole.select(range(5))}).save_to_disk(tmp_path / "dict")
    assert values(read_all(tmp_path / "plain")) == ROWS
    assert values(read_all(tmp_path / "dict", split="test")) == ROWS[:5]
    with pytest.raises(UserError, match="one of train, test"):
        read_all(tmp_path / "dict")
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    whole.to_parquet(hub / "train-00000-of-00001.parquet")
    whole.select(range(5)).to_parquet(hub / "test-00000-of-00001.parquet")
    assert values(read_all(tmp_path / "hub", split="test")) == ROWS[:5]
    with pytest.raises(UserError, match="no file of split 'dev'"):
        read_all(tmp_path / "hub", split="dev")


def test_without_a_network_hub_datasets_are_an_infrastructure_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InfraError, match=r"'c': hub dataset 'owner/name' cannot be downloaded .*save_to_disk"):
        find_files(CorpusConfig(name="c", hub="owner/name"), CorporaConfig())


def test_tasks_cover_the_input_once_and_in_order() -> None:
    corpus = corpus_at("x")
    files = [
        InputFile(f"/nowhere/{i}.jsonl", f"{i}.jsonl", "jsonl", size) for i, size in enumerate([5, 250, 0, 30, 100])
    ]
    tasks = plan_tasks(files, corpus, task_bytes=100)
    splits = [split for task in tasks for split in task]
    assert splits == [
        Split(0),
        Split(1, 0, 100),
        Split(1, 100, 200),
        Split(1, 200, 300),
        Split(2),
        Split(3),
        Split(4),
    ]
    assert [len(task) for task in tasks] == [1, 1, 1, 3, 1]


def document_of(row: dict[str, Any], **fields: Any) -> Document | Fault | None:
    return Mapper(corpus_at("x", **fields)).document(Row(7, 1, row))


def test_columns_are_found_or_mapped() -> None:
    assert document_of({"text": "a", "id": 5, "license": "MIT"}) == Document(7, "a", None, "5", "MIT")
    assert document_of({"prompt": "q", "response": 5}, license="CC0") == Document(7, "5", "q", None, "CC0")
    columns = {"prompt": "in", "response": "out", "id": "key", "license": "lic"}
    row = {"text": "no", "in": "", "out": "r", "key": "k", "lic": None}
    assert document_of(row, columns=columns, license="CC0") == Document(7, "r", "", "k", "CC0")


@pytest.mark.parametrize(
    ("row", "kind", "detail"),
    [
        ({"txt": "a", "n": 1}, "missing_column", r"no column 'text' \(columns found: txt, n\); did you mean 'txt'"),
        ({"prompt": "q"}, "missing_column", "no column 'response'"),
        ({"text": None}, "null", "'text' is null"),
        ({"text": ["a"]}, "wrong_type", "holds list"),
        ({"text": " \n"}, "empty", "holds no text"),
        ({"prompt": "q", "response": ""}, "empty", "'response' holds no text"),
        ({"text": "\ud800"}, "not_utf8", "surrogate"),
    ],
)
def test_faults_of_rows_are_told(row: dict[str, Any], kind: str, detail: str) -> None:
    fault = document_of(row)
    assert isinstance(fault, Fault)
    assert fault.kind == kind
    assert re.search(detail, fault.detail)


def test_filters() -> None:
    row = {"text": "abc", "lang": "de", "n": 1}
    assert document_of(row, where={"lang": ["de", "fr"], "n": "1"}) is not None
    assert document_of(row, where={"lang": "fr"}) is None
    assert document_of(row, min_chars=3, max_chars=3) is not None
    assert document_of(row, min_chars=4) is None
    assert document_of(row, max_chars=2) is None
    fault = document_of(row, where={"language": "de"})
    assert isinstance(fault, Fault) and "'language'" in fault.detail


def test_of_tables_only_the_columns_in_use_are_read() -> None:
    mapper = Mapper(corpus_at("x", where={"lang": "de"}))
    assert mapper.select(["junk", "lang", "text", "license"]) == ["text", "license", "lang"]
    with pytest.raises(MissingColumn, match="columns found: junk"):
        mapper.select(["junk"])
