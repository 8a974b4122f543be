"""Influence scores from gradients on disk. Needs numpy only; every vector is streamed.

Orientation, throughout: larger = more helpful, as in I_truth = L(test; without corpus) - L(test; with corpus). Leaving
out a corpus that gradient descent has followed moves the parameters by +c M g_corpus with some c > 0 and a
preconditioner M (the identity, or the inverse Hessian), which changes the test loss by c g_test . M g_corpus. So
none of the estimators needs its sign flipped; the sign of each assumes what its docstring names.
Sources: Isonuma & Titov (ACL 2024), section 2 and baselines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from isoray.attribution.eigenpairs import Eigenpairs
from isoray.attribution.vectors import Float64Array, cross_products, norm, open_vector
from isoray.errors import NumericError, UserError

Paths = Mapping[str, Path]
"""From the name of a set to the file of its summed gradient."""

Scores = dict[str, dict[str, float]]
"""``scores[test][corpus]``: the influence of a training corpus on a test set; larger = more helpful."""


def grad_dot(train: Paths, test: Paths) -> Scores:
    """g_train . g_test, gradients summed over examples.

    Positive: one step of ascent on the corpus raises the test loss to first order, so training on it had lowered it.
    """
    return _table(train, test, _products(train, test, normalise_train=False))


def grad_cos(train: Paths, test: Paths) -> Scores:
    """g_train . g_test / |g_train|: the test norm is common to all corpora, so it is left in. Sign as of GradDot."""
    return _table(train, test, _products(train, test, normalise_train=True))


def tracin(
    train: Sequence[Paths],
    test: Sequence[Paths],
    *,
    normalise_train: bool = True,
    learning_rates: Sequence[float] | None = None,
) -> Scores:
    """Sum over checkpoints of eta g_train . g_test, one mapping of gradients per checkpoint. Sign as of GradDot.

    The defaults are the published code's: training gradients normalised at each checkpoint, eta = 1. The paper's
    formula is ``normalise_train=False`` with the ``learning_rates`` of the checkpoints.
    """
    rates = [1.0] * len(train) if learning_rates is None else list(learning_rates)
    if not len(train) == len(test) == len(rates) or not train:
        raise UserError(
            f"TracIn got training gradients at {len(train)}, test gradients at {len(test)} checkpoints and "
            f"{len(rates)} learning rates; one each per checkpoint, and at least one checkpoint, was expected"
        )
    total = np.zeros((len(train[0]), len(test[0])))
    for rate, train_here, test_here in zip(rates, train, test, strict=True):
        total += rate * _products(
            {corpus: train_here[corpus] for corpus in train[0]},
            {name: test_here[name] for name in test[0]},
            normalise_train=normalise_train,
        )
    return _table(train[0], test[0], total)


def hif_lissa(train: Paths, inverse: Paths, *, normalise_train: bool = False) -> Scores:
    """g_train . H^-1 g_test, where ``inverse`` holds the H^-1 g_test of each test set (see :mod:`lissa`).

    Positive: to second order, dropping the corpus moves the optimum by H^-1 g_train / n, and that raises the test loss.
    Directions of negative curvature, for which this does not hold, are magnified by LiSSA but keep their sign.
    """
    return _table(train, inverse, _products(train, inverse, normalise_train=normalise_train))


def hif_arnoldi(train: Paths, test: Paths, eigenpairs: Eigenpairs, *, normalise_train: bool = True) -> Scores:
    """Sum over eigenpairs k of (g_train . e_k)(g_test . e_k) / lambda_k.

    Sign as of LiSSA, except that a direction of negative curvature counts with its sign flipped, as published.
    """
    names = [*train.values(), *test.values()]
    coordinates = eigenpairs.project([open_vector(path) for path in names])
    train_NK, test_MK = coordinates[: len(train)], coordinates[len(train) :]
    products = (train_NK / eigenpairs.values) @ test_MK.T
    if normalise_train:
        products /= _norms(train)[:, None]
    return _table(train, test, products)


def _products(train: Paths, test: Paths, *, normalise_train: bool) -> Float64Array:
    products = cross_products(
        [open_vector(path) for path in train.values()], [open_vector(path) for path in test.values()]
    )
    return products / _norms(train)[:, None] if normalise_train else products


def _norms(train: Paths) -> Float64Array:
    norms = {corpus: norm(open_vector(path)) for corpus, path in train.items()}
    zero = [corpus for corpus, size in norms.items() if size == 0.0]
    if zero:
        raise NumericError(
            f"the gradient of {', '.join(zero)} is zero and cannot be normalised; check that its examples have labels"
        )
    return np.array(list(norms.values()))


def _table(train: Paths, test: Paths, products: Float64Array) -> Scores:
    return {
        name: {corpus: float(products[row, column]) for row, corpus in enumerate(train)}
        for column, name in enumerate(test)
    }
