"""Approximate eigenpairs of a Hessian on disk: an orthonormal Krylov basis and the eigenpairs in its coordinates.

Needs numpy only. The eigenvectors themselves, as large as the basis, are never formed: a gradient is projected onto the
basis, and the small projected problem does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isoray.attribution.vectors import Float64Array, FloatArray, cross_products
from isoray.errors import DataError

BASIS = "basis.npy"
PAIRS = "eigenpairs.npz"


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs of a symmetric matrix, restricted to a Krylov space of dimension m."""

    values: Float64Array
    """float64 [p], by falling absolute value."""

    vectors: Float64Array
    """float64 [m, p], orthonormal columns: the eigenvectors in coordinates of the basis."""

    basis: FloatArray
    """[m, P], orthonormal rows; memory-mapped."""

    asymmetry: float
    """Largest relative deviation of the projected matrix from its transpose: rounding, 0 for an exact Hessian."""

    def project(self, gradients: Sequence[FloatArray]) -> Float64Array:
        """Coordinates g . e_k of gradients [P] along the eigenvectors: float64 [len(gradients), p]."""
        return cross_products(gradients, list(self.basis)) @ self.vectors

    def save(self, folder: Path) -> None:
        """Write all but the basis, which lies in ``folder`` already; the file's presence marks the folder complete."""
        partial = folder / (PAIRS + ".partial")
        with partial.open("wb") as file:
            np.savez(file, values=self.values, vectors=self.vectors, asymmetry=self.asymmetry)
        os.replace(partial, folder / PAIRS)

    @classmethod
    def open(cls, folder: Path) -> Eigenpairs:
        """The eigenpairs of a folder; DataError if it is incomplete."""
        try:
            with np.load(folder / PAIRS, allow_pickle=False) as pairs:
                values, vectors, asymmetry = pairs["values"], pairs["vectors"], float(pairs["asymmetry"])
            basis = np.load(folder / BASIS, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{folder}: no complete eigenpairs ({error}); {BASIS} and {PAIRS} were expected. Delete the folder and "
                "run again to compute them anew"
            ) from error
        return cls(values=values, vectors=vectors, basis=basis[: len(vectors)], asymmetry=asymmetry)
