"""Going back to the rows whose id an earlier row has, to show or to set aside what stands in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from isoray.corpora.documents import CorpusPlan, Run, position_of, raw_rows, write_quarantine
from isoray.corpora.read import Row


def find_rows(
    plan: CorpusPlan, runs: Sequence[Run], duplicates: Mapping[int, npt.NDArray[np.int64]]
) -> Iterator[tuple[str, Row]]:
    """(place in words, row) of each duplicate, in the order of the input."""
    wanted: dict[int, set[int]] = {}
    for number, indices in duplicates.items():
        records: npt.NDArray[Any] = runs[number].documents()[indices]
        for file in np.unique(records["file"]):
            positions = records["position"][records["file"] == file]
            wanted.setdefault(int(file), set()).update(positions.tolist())
    for splits in plan.tasks:
        for split in splits:
            positions = wanted.get(split.file, set())
            if positions:
                for row in raw_rows(plan, split):
                    if isinstance(row, Row) and row.position in positions:
                        yield position_of(plan, split, row.line), row


def set_aside(plan: CorpusPlan, rows: Iterator[tuple[str, Row]]) -> None:
    """Write the rows to the store's quarantine."""
    path = plan.folder / "quarantine" / "duplicates.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    for where, row in rows:
        write_quarantine(path, where, "duplicate_id", "an earlier row has the same id", row.values)
