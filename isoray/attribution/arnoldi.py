"""Dominant eigenpairs of a Hessian by Arnoldi iteration, for influence functions (Schioppa et al. 2022)."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoray.attribution.config import ArnoldiConfig
from isoray.attribution.eigenpairs import BASIS, PAIRS, Eigenpairs
from isoray.attribution.hessian import MeanHessian, Product, norm
from isoray.attribution.vectors import Float64Array, FloatArray, chunks
from isoray.errors import InfraError, NumericError

ASYMMETRY_LIMIT = 0.1


def save_eigenpairs(hessian: MeanHessian, folder: Path, config: ArnoldiConfig, *, seed: int) -> Eigenpairs:
    """:func:`arnoldi` from a seeded random normal vector; ``folder`` is readable by :meth:`Eigenpairs.open` after."""
    start_P = hessian.random_normal(seed)
    return arnoldi(hessian, start_P, folder, dimension=config.dimension, eigenpairs=config.eigenpairs)


def arnoldi(product: Product, start_P: Tensor, folder: Path, *, dimension: int, eigenpairs: int) -> Eigenpairs:
    """The ``eigenpairs`` dominant eigenpairs of a symmetric matrix in the Krylov space of ``start_P``.

    Takes ``dimension`` products, fewer where the space is exhausted; every new vector is orthogonalised against all
    earlier ones, twice. The projected matrix is symmetrised before its eigenpairs are taken. Eigenvalues that are zero
    up to rounding are dropped, for influence divides by them. The basis is written to ``folder`` as it grows; memory
    holds three vectors. NumericError if a product is not finite or the matrix is not symmetric; InfraError if the disk
    is too small.
    """
    (folder / PAIRS).unlink(missing_ok=True)
    basis = _create_basis(folder, dimension, start_P)
    epsilon = torch.finfo(start_P.dtype).eps
    hessenberg = np.zeros((dimension, dimension))
    vector_P = start_P / norm(start_P)
    found, largest = 0, 0.0
    while found < dimension:
        basis[found] = vector_P.cpu().numpy()
        found += 1
        vector_P = product(vector_P)
        size = norm(vector_P)
        if not math.isfinite(size):
            raise NumericError(
                f"Hessian-vector product {found} of {dimension} is not finite; check that the loss is, and use float32"
            )
        hessenberg[:found, found - 1] = orthogonalise(vector_P, basis[:found])
        largest, rest = max(largest, size), norm(vector_P)
        if found == dimension or rest <= 10 * epsilon * largest:
            break
        hessenberg[found, found - 1] = rest
        vector_P /= rest
    basis.flush()
    values, vectors, asymmetry = _dominant(hessenberg[:found, :found], eigenpairs, epsilon=epsilon)
    pairs = Eigenpairs(values=values, vectors=vectors, basis=basis[:found], asymmetry=asymmetry)
    pairs.save(folder)
    return pairs


def orthogonalise(vector_P: Tensor, basis: FloatArray) -> Float64Array:
    """Make ``vector_P`` orthogonal, in place, to the orthonormal rows of ``basis`` [m, P]; return its former parts [m].

    Classical Gram-Schmidt, twice: one pass leaves components of the size of rounding times what it took out.
    Streams the basis to the vector's device and sums in float64.
    """

    def rows(part: slice) -> Tensor:
        return torch.from_numpy(basis[:, part]).to(vector_P.device, torch.float64)

    total = torch.zeros(len(basis), dtype=torch.float64, device=vector_P.device)
    for _ in range(2):
        components = torch.zeros_like(total)
        for part in chunks(len(vector_P)):
            components += rows(part) @ vector_P[part].double()
        for part in chunks(len(vector_P)):
            vector_P[part] -= (components @ rows(part)).to(vector_P.dtype)
        total += components
    return np.asarray(total.cpu().numpy())


def _create_basis(folder: Path, dimension: int, start_P: Tensor) -> np.memmap[tuple[int, int], np.dtype[np.floating]]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BASIS).unlink(missing_ok=True)
    dtype = start_P[:0].cpu().numpy().dtype
    needed, free = dimension * len(start_P) * dtype.itemsize, shutil.disk_usage(folder).free
    if needed > free:
        # Writing through a memory map to a full disk would kill the process with SIGBUS.
        raise InfraError(
            f"{folder}: a Krylov basis of {dimension} vectors needs {needed / 2**30:.1f} GiB of disk; "
            f"{free / 2**30:.1f} are free. Free some, point the run elsewhere, or lower the `dimension` of Arnoldi"
        )
    open_memmap: Any = np.lib.format.open_memmap
    basis: np.memmap[tuple[int, int], np.dtype[np.floating[Any]]]
    basis = open_memmap(folder / BASIS, mode="w+", dtype=dtype, shape=(dimension, len(start_P)))
    return basis


def _dominant(projected: Float64Array, count: int, *, epsilon: float) -> tuple[Float64Array, Float64Array, float]:
    scale = float(np.abs(projected).max())
    if scale == 0.0:
        raise NumericError(
            "the Hessian is zero: the loss does not depend on the trainable parameters beyond first order"
        )
    asymmetry = float(np.abs(projected - projected.T).max()) / scale
    if asymmetry > ASYMMETRY_LIMIT:
        raise NumericError(
            f"the projected Hessian differs from its transpose by {asymmetry:.0%} of its largest entry; a Hessian is "
            "symmetric. The loss is not twice differentiable (a custom backward?), or it is not the same at every call"
        )
    values, vectors = np.linalg.eigh((projected + projected.T) / 2)
    order = np.argsort(-np.abs(values), kind="stable")[:count]
    order = order[np.abs(values[order]) > len(values) * epsilon * scale]
    return values[order], vectors[:, order], asymmetry
