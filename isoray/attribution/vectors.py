"""Parameter-sized vectors in ``.npy`` files, and inner products that stream them. Needs numpy only.

A gradient of a 135M-parameter model takes half a gigabyte and a comparison needs dozens, so vectors are memory-mapped
and read in chunks, each once; sums are kept in float64.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isoray.errors import DataError

FloatArray = npt.NDArray[np.floating[Any]]
Float64Array = npt.NDArray[np.float64]

CHUNK = 2**16


def chunks(size: int, chunk: int = CHUNK) -> Iterator[slice]:
    """Consecutive slices of at most ``chunk`` elements that cover ``range(size)``."""
    for start in range(0, size, chunk):
        yield slice(start, min(start + chunk, size))


def save_vector(path: Path, vector: FloatArray) -> None:
    """Write a vector as ``path``, whole or not at all; an older file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.save(file, vector, allow_pickle=False)
    os.replace(partial, path)


def open_vector(path: Path) -> FloatArray:
    """A read-only memory map of a vector written by :func:`save_vector`; DataError if there is none."""
    try:
        vector: FloatArray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: no readable vector ({error}); a .npy file of one floating-point array was expected. Delete it, "
            "if it is there, and run again to compute it anew"
        ) from error
    if vector.ndim != 1 or not np.issubdtype(vector.dtype, np.floating):
        raise DataError(f"{path}: holds {vector.dtype}{list(vector.shape)}; one floating-point vector was expected")
    return vector


def cross_products(rows: Sequence[FloatArray], columns: Sequence[FloatArray], *, chunk: int = CHUNK) -> Float64Array:
    """All inner products of ``rows`` with ``columns``: float64 [len(rows), len(columns)].

    Reads every vector once; holds ``chunk`` elements of each in memory. DataError if the lengths differ.
    """
    sizes = {len(vector) for vector in (*rows, *columns)}
    if len(sizes) > 1:
        raise DataError(
            f"vectors of different lengths {sorted(sizes)} cannot be multiplied: they come from different models or "
            "from different choices of trainable parameters; delete the older ones and run again"
        )
    products = np.zeros((len(rows), len(columns)))
    for part in chunks(max(sizes, default=0), chunk):
        left = np.array([vector[part] for vector in rows], dtype=np.float64)
        right = np.array([vector[part] for vector in columns], dtype=np.float64)
        # Not `@`: BLAS rounds otherwise with another number of threads, and scores must not hang on that.
        products += np.einsum("np,mp->nm", left, right)
    return products


def norm(vector: FloatArray, *, chunk: int = CHUNK) -> float:
    """The Euclidean norm, summed in float64."""
    total = 0.0
    for part in chunks(len(vector), chunk):
        values = vector[part].astype(np.float64)
        total += float(np.einsum("p,p->", values, values))
    return float(np.sqrt(total))
