"""Rows become documents: columns mapped, rows filtered, what is wrong with a row told."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from isoray.config.base import nearest
from isoray.corpora.config import CorpusConfig
from isoray.corpora.read import Row

HUGE_CHARS = 1_000_000
"""Documents of so many characters or more are noted in the manifest."""


class Document(NamedTuple):
    """A row in the terms of the project."""

    position: int
    text: str
    """The document, or the response."""
    prompt: str | None
    id: str | None
    license: str


class Fault(NamedTuple):
    """Why a row cannot be used."""

    kind: str
    """missing_column, null, wrong_type, not_utf8 or empty."""
    detail: str


class Mapped(NamedTuple):
    """Which column plays which part."""

    text: str
    prompt: str | None
    id: str | None
    license: str | None


class MissingColumn(Exception):
    """A column that the configuration names (or presumes) is not there; the message lists those that are."""


class Mapper:
    """Maps rows of one corpus to documents."""

    def __init__(self, corpus: CorpusConfig) -> None:
        self.corpus = corpus
        self._accepted = {
            column: {_as_text(value) for value in (values if isinstance(values, tuple) else (values,))}
            for column, values in corpus.where.items()
        }
        self._known: dict[tuple[str, ...], Mapped] = {}

    def select(self, available: Sequence[str]) -> list[str]:
        """The columns to read of a table that has ``available``. Raises MissingColumn."""
        mapped = self._map(tuple(available))
        wanted = [*(column for column in mapped if column is not None), *self._accepted]
        return list(dict.fromkeys(wanted))

    def document(self, row: Row) -> Document | Fault | None:
        """The document in ``row``, what is wrong with it, or None when filters leave it out."""
        values = row.values
        try:
            mapped = self._map(tuple(values))
        except MissingColumn as error:
            return Fault("missing_column", str(error))
        if any(_as_text(values[column]) not in accepted for column, accepted in self._accepted.items()):
            return None
        parts = (mapped.text,) if mapped.prompt is None else (mapped.prompt, mapped.text)
        for column in parts:
            fault = _fault_in(column, values[column])
            if fault is not None:
                return fault
        text = str(values[mapped.text])
        prompt = None if mapped.prompt is None else str(values[mapped.prompt])
        if not text.strip():
            return Fault("empty", f"column {mapped.text!r} holds no text")
        size = len(text) + len(prompt or "")
        if size < (self.corpus.min_chars or 0) or size > (self.corpus.max_chars or size):
            return None
        identity = None if mapped.id is None else values[mapped.id]
        licence = (values[mapped.license] if mapped.license is not None else None) or self.corpus.license or ""
        return Document(row.position, text, prompt, None if identity is None else str(identity), _clean(licence))

    def _map(self, available: tuple[str, ...]) -> Mapped:
        if available not in self._known:
            self._known[available] = self._resolve(available)
        return self._known[available]

    def _resolve(self, available: tuple[str, ...]) -> Mapped:
        columns = self.corpus.columns
        text, prompt = columns.text, columns.prompt
        if columns.response is not None:
            text = columns.response
        elif text is None and "text" not in available and {"prompt", "response"} & set(available):
            text, prompt = "response", "prompt"
        mapped = Mapped(
            text=text or "text",
            prompt=prompt,
            id=columns.id or next((name for name in ("doc_id", "id") if name in available), None),
            license=columns.license or ("license" if "license" in available else None),
        )
        for column in (*mapped, *self._accepted):
            if column is not None and column not in available:
                raise MissingColumn(self._missing(column, available))
        return mapped

    def _missing(self, column: str, available: tuple[str, ...]) -> str:
        found = ", ".join(available) or "none"
        close = difflib.get_close_matches(column, available, n=1)
        hint = f"; {nearest(column, available)}" if close else ""
        what = f"no column {column!r} (columns found: {found}){hint}"
        unmapped = self.corpus.columns.text is None and self.corpus.columns.prompt is None
        return what + (
            "; say which column is meant with `columns: {text: ...}`" if unmapped and column == "text" else ""
        )


def _fault_in(column: str, value: Any) -> Fault | None:
    if value is None:
        return Fault("null", f"column {column!r} is null")
    if isinstance(value, Mapping | list | bytes | bool):
        return Fault("wrong_type", f"column {column!r} holds {type(value).__name__}, not text")
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return Fault("not_utf8", f"column {column!r} holds half of a surrogate pair, which no encoding can express")
    return None


def _clean(value: Any) -> str:
    return str(value).encode(errors="backslashreplace").decode()


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)
