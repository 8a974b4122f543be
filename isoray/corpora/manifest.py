"""What a block store says about itself: counts, digests, licences, and what became of every row of every input file."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isoray.errors import DataError

MANIFEST = "manifest.json"


class Record(BaseModel):
    """A frozen record that is written as JSON; unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileReport(Record):
    """What was read from one input file; rows = kept + filtered + sampled_out + all issues."""

    path: str
    """The file, relative to where the corpus was found."""
    sha256: str = ""
    """SHA-256 of the file's bytes as they lie there (compressed if it is)."""
    bytes: int = 0
    """Size of the file."""
    rows: int = 0
    """Rows found, good or bad."""
    kept: int = 0
    """Documents that are in the store."""
    filtered: int = 0
    """Rows left out by `where`, `min_chars` or `max_chars`."""
    sampled_out: int = 0
    """Good rows left out by `limit` or `max_tokens`."""
    issues: dict[str, int] = Field(default_factory=dict)
    """Rows left out because they were bad, by kind."""
    notes: dict[str, int] = Field(default_factory=dict)
    """What was kept but is worth knowing, by kind (empty_file, huge_document, duplicate_id)."""


class ShardReport(Record):
    """What one shard holds."""

    folder: str
    """Name of the shard's folder."""
    blocks: int
    """Number of blocks."""
    tokens: int
    """Number of tokens."""
    label_tokens: int
    """Number of tokens that carry a label."""
    segments: int
    """Number of segments: documents, and pieces of documents that were split over blocks."""
    digest: str
    """SHA-256 of the arrays."""
    bytes: dict[str, int]
    """Size of each array file, to notice truncated ones."""


class Manifest(Record):
    """What a store holds and where it came from."""

    format: int = 1
    """Version of the layout on disk."""
    name: str
    """The corpus."""
    key: str = ""
    """Digest of everything the store was made from: files, config, tokenizer. Equal key, equal content."""
    digest: str
    """SHA-256 of the content: tokens, labels and boundaries of all blocks in order."""
    blocks: int
    """Number of blocks."""
    documents: int
    """Number of documents in them."""
    tokens: int
    """Number of tokens."""
    label_tokens: int
    """Number of tokens that carry a label."""
    segments: int
    """Number of segments (pieces of documents)."""
    tokenizer: str = ""
    """Digest of the tokenizer."""
    packed: bool = False
    """Whether blocks hold several documents."""
    length: int | None = None
    """The block length asked for, in tokens."""
    dropped_tokens: int = 0
    """Tokens left out: truncated examples, and the remainder at the end where it is dropped."""
    truncated: int = 0
    """Documents that lost tokens because they are longer than a block."""
    licenses: dict[str, int] = Field(default_factory=dict)
    """Documents per licence; an unknown licence is the empty name."""
    issues: dict[str, int] = Field(default_factory=dict)
    """Bad rows that were left out, by kind, over all files."""
    files: tuple[FileReport, ...] = ()
    """Every input file."""
    shards: tuple[ShardReport, ...]
    """Every shard, in order."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest in ``folder``. Raises DataError when it is absent or cannot be read."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} holds no complete block store ({MANIFEST} is missing); build it first") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete {folder} and build it again") from error
