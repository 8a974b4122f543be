"""Gradients summed over the examples of a set, as one flat vector (the g_Z of Isonuma & Titov 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from isoray.attribution.vectors import save_vector
from isoray.errors import NumericError, UserError

Batch = Mapping[str, Tensor]

LossSums = Callable[[nn.Module, Batch], Tensor]
"""The SUM over the examples of a micro-batch of each example's mean token NLL (a scalar): additive over micro-batches,
so no result depends on how they are cut, as :func:`isoray.objectives.reduce.example_nll_sum` is. For Hessians it must
be twice differentiable."""


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, in the order in which a vector holds them; a tied weight stands once."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UserError(f"{type(model).__name__} has no trainable parameters, so no gradients; unfreeze some")
    return parameters


def vector_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """float64 if any parameter is, else float32 (also for bfloat16 models, whose sums would lose most examples)."""
    return torch.float64 if any(parameter.dtype == torch.float64 for parameter in parameters) else torch.float32


def split(vector_P: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat vector in the shapes of ``parameters``."""
    pieces = torch.split_with_sizes(vector_P, [parameter.numel() for parameter in parameters])
    return [piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, so that gradients are functions of the data alone; every submodule's mode is put back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def summed_gradient(model: nn.Module, batches: Iterable[Batch], loss_sums: LossSums) -> Tensor:
    """The gradient of the loss summed over the examples of ``batches``: [P], float32 (float64 for a float64 model).

    The batches lie on the model's device, where the result lies too. Leaves the parameters' ``.grad`` alone. The sum of
    several workers' results is the gradient of all their batches. NumericError if the loss or the result is not finite.
    """
    parameters = trainable(model)
    size = sum(parameter.numel() for parameter in parameters)
    total_P = torch.zeros(size, dtype=vector_dtype(parameters), device=parameters[0].device)
    views = split(total_P, parameters)
    total_loss = torch.zeros((), dtype=torch.float64, device=total_P.device)
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            loss = loss_sums(model, batch)
            total_loss += loss.detach()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for view, gradient in zip(views, gradients, strict=True):
                if gradient is not None:
                    view += gradient
    # The gradient of a masked 0 / 0 can be finite although the loss is not.
    if not (torch.isfinite(total_loss) and torch.isfinite(total_P).all()):
        raise NumericError(
            f"the summed loss ({total_loss.item():g}) or its gradient is not finite. Look for examples without labels, "
            "and compute gradients in float32"
        )
    return total_P


def save_gradient(model: nn.Module, batches: Iterable[Batch], loss_sums: LossSums, path: Path) -> float:
    """Write the :func:`summed_gradient` of a set to ``path`` (.npy) and return its norm."""
    gradient_P = summed_gradient(model, batches, loss_sums)
    save_vector(path, gradient_P.cpu().numpy())
    return float(torch.linalg.vector_norm(gradient_P, dtype=torch.float64))
