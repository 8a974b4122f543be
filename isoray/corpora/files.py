"""Finding and opening the files of a corpus, wherever they lie."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
from fsspec.implementations.arrow import ArrowFSWrapper  # type: ignore[import-untyped]

from isoray.config.base import nearest
from isoray.corpora.config import CorporaConfig, CorpusConfig
from isoray.errors import DataError, InfraError, UserError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
}
READ_BYTES = 1 << 20
DECOMPRESS_BYTES = 1 << 16
"""How much is decompressed at a time: no more than this is lost of a file that breaks off."""


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus."""

    url: str
    """Absolute path, or a URL."""
    label: str
    """How it is called in reports and ordered: its path relative to where the corpus was found."""
    format: str
    """jsonl, parquet, csv, text or arrow."""
    bytes: int
    """Its size."""
    modified: str = ""
    """When it was last changed, as the file system puts it; empty if it does not say."""


def find_files(corpus: CorpusConfig, settings: CorporaConfig) -> list[InputFile]:
    """The files of ``corpus``, in the order in which they are read. A generated corpus has none.

    Raises UserError for a path that does not exist (with the nearest name that does) and for a folder whose files have
    several formats; InfraError when the hub cannot be reached.
    """
    if corpus.generator is not None:
        return []
    if corpus.hub is not None:
        urls = [(path, os.path.basename(path)) for path in _download(corpus)]
    else:
        assert corpus.path is not None
        locations = [corpus.path] if isinstance(corpus.path, str) else corpus.path
        parts = [list(_expand(_absolute(location, settings.root), corpus)) for location in locations]
        urls = [found for part in parts for found in part]
        if len(set(dict(urls).values())) < len(dict(urls)):  # b/x and c/x: told apart by their number
            urls = [(url, f"{number}/{label}") for number, part in enumerate(parts) for url, label in part]
    files = []
    for url, label in dict(urls).items():
        fs, path = open_filesystem(url)
        info = fs.info(path)
        modified = next((str(info[key]) for key in ("mtime", "LastModified", "ETag", "etag") if info.get(key)), "")
        files.append(InputFile(url, label, _format_of(url, corpus), int(info["size"]), modified))
    return files


def open_filesystem(url: str) -> tuple[Any, str]:
    """An fsspec file system and the path in it. Raises UserError when nothing that is installed knows the URL."""
    scheme = url.partition("://")[0] if "://" in url else "file"
    try:
        if scheme in ("s3", "gs", "gcs", "hdfs", "viewfs"):
            from pyarrow.fs import FileSystem

            fs, path = FileSystem.from_uri(url)
            return ArrowFSWrapper(fs), path
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(url))
    except (ImportError, ValueError, pa.ArrowInvalid) as error:
        raise UserError(f"cannot open {url}: {error}") from error
    except OSError as error:
        raise InfraError(
            f"{url} cannot be reached: {error}. Check the address, the credentials and the network, then run again."
        ) from error


def open_bytes(url: str) -> BinaryIO:
    """The file's bytes as they lie there, seekable."""
    if "://" not in url:
        return open(url, "rb", buffering=READ_BYTES)
    fs, path = open_filesystem(url)
    return cast("BinaryIO", fs.open(path, "rb"))


def open_decompressed(url: str) -> BinaryIO:
    """The file's content, decompressed if its name says that it is compressed."""
    codec = compression_of(url)
    if codec is None:
        return open_bytes(url)
    stream = pa.CompressedInputStream(pa.PythonFile(open_bytes(url), mode="r"), codec)
    return cast("BinaryIO", io.BufferedReader(cast("Any", stream), DECOMPRESS_BYTES))


def compression_of(url: str) -> str | None:
    """The codec that the name's last suffix stands for, if any."""
    return COMPRESSIONS.get(PurePosixPath(url).suffix.lower())


def sha256_of(url: str) -> str:
    """SHA-256 of the file's bytes as they lie there."""
    with open_bytes(url) as stream:
        return hashlib.file_digest(cast("io.BufferedReader", stream), "sha256").hexdigest()


def _absolute(location: str, root: str) -> str:
    if "://" in location:
        return location
    if "://" in root:
        return root.rstrip("/") + "/" + location
    return os.path.abspath(os.path.join(os.path.expanduser(root), os.path.expanduser(location)))


def _expand(location: str, corpus: CorpusConfig) -> Iterator[tuple[str, str]]:
    """(URL, label) of each file at ``location``, sorted by label."""
    fs, path = open_filesystem(location)
    remote = "://" in location

    def url_of(found: str) -> str:
        if not remote:
            return found
        return (
            location.partition("://")[0] + "://" + found.lstrip("/")
            if isinstance(fs, ArrowFSWrapper)
            else str(fs.unstrip_protocol(found))
        )

    if re.search(r"[*\[]", path) or ("?" in path and not remote):
        base = path[: re.search(r"[*?\[]", path).start()].rpartition("/")[0]  # type: ignore[union-attr]
        found = [name for name in _visible(fs.glob(path), base) if fs.isfile(name)]
        if not found:
            raise UserError(f"corpus {corpus.name!r}: no file matches {location}")
    elif fs.isdir(path):
        base = path
        found = _in_folder(fs, path, corpus)
    elif fs.exists(path):
        base = path.rpartition("/")[0]
        found = [path]
    else:
        raise UserError(f"corpus {corpus.name!r}: {location} does not exist: {_nearest_path(fs, path)}")
    yield from ((url_of(name), name.removeprefix(base).lstrip("/")) for name in sorted(found))


def _in_folder(fs: Any, folder: str, corpus: CorpusConfig) -> list[str]:
    if fs.exists(f"{folder}/dataset_dict.json"):
        splits = json.loads(fs.cat_file(f"{folder}/dataset_dict.json"))["splits"]
        if corpus.split not in splits:
            raise UserError(f"corpus {corpus.name!r}: set `split` to one of {', '.join(splits)} (found in {folder})")
        folder = f"{folder}/{corpus.split}"
    if fs.exists(f"{folder}/state.json"):
        parts = json.loads(fs.cat_file(f"{folder}/state.json"))["_data_files"]
        return [f"{folder}/{part['filename']}" for part in parts]
    found = _visible(fs.find(folder), folder)
    if corpus.format == "auto":
        found = [name for name in found if _suffix(name) in FORMATS]
        formats = Counter(FORMATS[_suffix(name)] for name in found)
        if len(formats) > 1:
            counts = ", ".join(f"{count} {name}" for name, count in formats.items())
            raise UserError(f"corpus {corpus.name!r}: {folder} holds files of several formats ({counts}): set `format`")
    else:
        found = [name for name in found if FORMATS.get(_suffix(name), corpus.format) == corpus.format]
    if corpus.split is not None:
        of_split = re.compile(rf"(^|[/_.-]){re.escape(corpus.split)}([/_.-]|$)")
        found = [name for name in found if of_split.search(name.removeprefix(folder))]
    if not found:
        what = "file of a known format" if corpus.split is None else f"file of split {corpus.split!r}"
        raise UserError(f"corpus {corpus.name!r}: {folder} holds no {what} ({', '.join(sorted(FORMATS))})")
    return found


def _visible(names: Iterable[str], base: str) -> list[str]:
    """``names`` without what is hidden, or marked as no data by a leading underscore, below ``base``."""
    return [name for name in names if not re.search(r"(^|/)[._]", name.removeprefix(base).lstrip("/"))]


def _suffix(name: str) -> str:
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _format_of(url: str, corpus: CorpusConfig) -> str:
    if corpus.format != "auto":
        return corpus.format
    if _suffix(url) in FORMATS:
        return FORMATS[_suffix(url)]
    known = ", ".join(sorted(FORMATS))
    raise UserError(f"corpus {corpus.name!r}: {url} has no known suffix ({known}): set `format`")


def _nearest_path(fs: Any, path: str) -> str:
    """A hint for a path that does not exist: names in its deepest folder that does."""
    parts = path.split("/")
    for depth in range(len(parts) - 1, 0, -1):
        parent = "/".join(parts[:depth]) or "/"
        if fs.isdir(parent):
            names = [PurePosixPath(name).name for name in fs.ls(parent, detail=False)]
            return f"{parent} has no {parts[depth]!r}; " + nearest(parts[depth], names[:1000])
    return "nor does any folder above it"


def _download(corpus: CorpusConfig) -> list[str]:
    """The Arrow files of a hub dataset, downloaded to the local cache of `datasets`."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    assert corpus.hub is not None
    try:
        found = datasets.load_dataset(corpus.hub, corpus.subset, split=corpus.split or "train")
    except DatasetNotFoundError as error:
        raise UserError(f"corpus {corpus.name!r}: hub dataset {corpus.hub!r}: {error}") from error
    except ValueError as error:
        raise UserError(f"corpus {corpus.name!r}: hub dataset {corpus.hub!r}: {error}") from error
    except OSError as error:
        raise InfraError(
            f"corpus {corpus.name!r}: hub dataset {corpus.hub!r} cannot be downloaded ({error}); check the network, or "
            "download it elsewhere with `save_to_disk` and give that folder as `path`"
        ) from error
    files = [str(file["filename"]) for file in found.cache_files]
    if not files:
        raise DataError(f"corpus {corpus.name!r}: hub dataset {corpus.hub!r} has no files for split {corpus.split!r}")
    return [str(Path(file)) for file in files]
