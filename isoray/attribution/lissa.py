"""Inverse-Hessian-vector products by LiSSA, the truncated Neumann series of Agarwal, Bullins & Hazan (2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isoray.attribution.config import LissaConfig
from isoray.attribution.hessian import MeanHessian, Product, norm
from isoray.attribution.vectors import open_vector, save_vector
from isoray.errors import NumericError


@dataclass(frozen=True)
class LissaReport:
    """How the series went."""

    step_size: float
    """The alpha it was run with."""

    norms: tuple[float, ...]
    """Norm of each term of the series, the first being that of the test gradient."""

    @property
    def diverged(self) -> bool:
        """Whether the terms grew: the sum is then finite, but far from an inverse."""
        return self.norms[-1] > self.norms[0]


def largest_eigenvalue(product: Product, start_P: Tensor, *, iterations: int) -> float:
    """The largest |eigenvalue| of a symmetric matrix, from below, by power iteration. NumericError if 0 or infinite."""
    vector_P = start_P / norm(start_P)
    size = 0.0
    for _ in range(iterations):
        vector_P = product(vector_P)
        size = norm(vector_P)
        if not math.isfinite(size) or size == 0.0:
            raise NumericError(
                f"power iteration on the Hessian met a product of norm {size}; a positive number was expected. Check "
                "that the loss is finite and depends on the trainable parameters"
            )
        vector_P /= size
    return size


def choose_step_size(hessian: MeanHessian, config: LissaConfig, *, seed: int) -> float:
    """``config.step_size``, or 1 / (largest |eigenvalue| + damping). Depends on the Hessian alone: once per model.

    The series converges for steps below 2 / (largest eigenvalue + damping), so that power iteration may be wrong by a
    factor of two. With directions of negative curvature no step makes it converge; this one keeps their growth below a
    factor of two per iteration.
    """
    if config.step_size is not None:
        return config.step_size
    largest = largest_eigenvalue(hessian, hessian.random_normal(seed), iterations=config.power_iterations)
    return 1.0 / (largest + config.damping)


def inverse_product(
    product: Product, vector_P: Tensor, *, iterations: int, step_size: float, damping: float = 0.0
) -> tuple[Tensor, LissaReport]:
    """Approximates (H + damping I)^-1 v by alpha sum_{j=0..iterations} (I - alpha (H + damping I))^j v.

    ``vector_P`` is left alone. Holds three vectors. NumericError if a term is not finite.
    """
    term_P, sum_P = vector_P.clone(), vector_P.clone()
    norms = [norm(term_P)]
    for iteration in range(1, iterations + 1):
        product_P = product(term_P)
        term_P.mul_(1.0 - step_size * damping).sub_(product_P, alpha=step_size)
        sum_P += term_P
        norms.append(norm(term_P))
        if not math.isfinite(norms[-1]):
            raise NumericError(
                f"LiSSA diverged: term {iteration} of {iterations} is not finite at step size {step_size:g} (the norms "
                f"before it: {', '.join(f'{size:.3g}' for size in norms[:-1])}). Set a smaller `step_size`, or leave "
                "it empty to have it chosen from the Hessian; `damping` helps against negative curvature"
            )
    return sum_P.mul_(step_size), LissaReport(step_size=step_size, norms=tuple(norms))


def save_inverse_product(
    hessian: MeanHessian, gradient: Path, path: Path, config: LissaConfig, *, step_size: float
) -> LissaReport:
    """Read a test set's summed gradient from ``gradient``, write its inverse-Hessian product to ``path`` (.npy)."""
    vector_P = torch.from_numpy(np.array(open_vector(gradient))).to(hessian.device)
    inverse_P, report = inverse_product(
        hessian, vector_P, iterations=config.iterations, step_size=step_size, damping=config.damping
    )
    save_vector(path, inverse_P.cpu().numpy())
    return report
