"""Exact products of the training loss's Hessian with vectors, by double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from isoray.attribution.gradient import Batch, LossSums, evaluating, split, trainable, vector_dtype
from isoray.errors import UserError

Product = Callable[[Tensor], Tensor]
"""v [P] -> H v [P] for a symmetric H; must leave v alone."""


@dataclass(frozen=True)
class MeanHessian:
    """The Hessian H of the mean loss over the examples of ``batches``, as the function v -> H v.

    H = (1 / examples) sum over examples of the Hessian of each example's loss, however the micro-batches are cut.
    (Published code for UnTrac weighs the first micro-batch by 1 and every later one by the size of the one before.)
    ``batches`` are gone through at every product. Dropout is off, and attention runs on the math kernel, as the fused
    ones have no second derivative. UserError for half-precision parameters, whose products drown in rounding.
    """

    model: nn.Module
    batches: Sequence[Batch]
    loss_sums: LossSums
    examples: int

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise UserError(f"a mean over {self.examples} examples has no Hessian; give at least one example")
        half = [p.dtype for p in trainable(self.model) if p.dtype not in (torch.float32, torch.float64)]
        if half:
            raise UserError(
                f"Hessian-vector products need float32 parameters, some are {half[0]}; load the model in float32"
            )

    def __call__(self, vector_P: Tensor) -> Tensor:
        """H v: [P], of the dtype and on the device of v."""
        parameters = trainable(self.model)
        directions = split(vector_P, parameters)
        total_P = torch.zeros_like(vector_P)
        views = split(total_P, parameters)
        with evaluating(self.model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for batch in self.batches:
                loss = self.loss_sums(self.model, batch)
                gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                # Where the loss is linear in a parameter its gradient is a constant, with no graph to go back through.
                pairs = [
                    (gradient, direction)
                    for gradient, direction in zip(gradients, directions, strict=True)
                    if gradient is not None and gradient.requires_grad
                ]
                if not pairs:
                    continue
                outputs, vectors = zip(*pairs, strict=True)
                products = torch.autograd.grad(outputs, parameters, grad_outputs=vectors, allow_unused=True)
                for view, product in zip(views, products, strict=True):
                    if product is not None:
                        view += product
        return total_P.div_(self.examples)

    @property
    def device(self) -> torch.device:
        """Where the parameters lie, and where vectors must."""
        return trainable(self.model)[0].device

    def random_normal(self, seed: int) -> Tensor:
        """A standard normal vector [P] to start an iteration from: the same on every device for one seed."""
        parameters = trainable(self.model)
        size = sum(parameter.numel() for parameter in parameters)
        generator = torch.Generator().manual_seed(seed)
        vector_P = torch.randn(size, generator=generator, dtype=vector_dtype(parameters))
        return vector_P.to(self.device)


def norm(vector_P: Tensor) -> float:
    """The Euclidean norm, summed in float64."""
    return float(torch.linalg.vector_norm(vector_P, dtype=torch.float64))
