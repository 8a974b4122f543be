"""Clipped sums of the gradients of single examples, through Opacus' hooks on the model's layers.

Opacus derives an example's gradient of a layer from what went into the layer and what came back for its output, and
takes dimension 0 of both for the examples. :func:`example_nll` keeps that dimension everywhere, and
:meth:`PerExampleGradients.add` compares with plain backward passes of single examples before it trusts a model.

Imports Opacus, an optional dependency: import this module only where it is used.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from opacus.grad_sample.linear import compute_linear_grad_sample, compute_linear_norm_sample
from opacus.grad_sample.utils import register_grad_sampler, register_norm_sampler
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from isoray.errors import UserError
from isoray.models.structure import head_of, plain
from isoray.objectives.reduce import IGNORE, Batch

Call = Callable[..., Any]

TOLERANCE = 1e-3
"""How far, relatively, an example's norm may be from that of a backward pass of its own: rounding stays far below."""


def example_nll(model: nn.Module, batch: Batch) -> Tensor:
    """Mean NLL of the labelled tokens of each row (0 where there are none): shape [B], float32 or wider.

    The terms of :func:`isoray.objectives.reduce.example_nll_sum`, computed so that dimension 0 counts examples in every
    layer: position ids are those of the whole batch, and the head sees [B, K, H] with K the most labels of a row.
    """
    targets_BT = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)  # position t predicts token t + 1
    counts_B = (targets_BT != IGNORE).sum(dim=1)
    labelled_first_BT = (targets_BT != IGNORE).byte().argsort(dim=1, descending=True, stable=True)
    place_BK = labelled_first_BT[:, : max(1, int(counts_B.max()))]
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if "position_ids" in inspect.signature(plain(model).forward).parameters:
        rows, length = batch["input_ids"].shape
        inputs["position_ids"] = torch.arange(length, device=place_BK.device).repeat(rows, 1)

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden_BTH = args[0]
        return (hidden_BTH.gather(1, place_BK[..., None].expand(-1, -1, hidden_BTH.shape[2])),)

    hook = head_of(model).register_forward_pre_hook(gather)
    try:
        logits_BKV: Tensor = model(**inputs).logits
    finally:
        hook.remove()
    wide = torch.promote_types(logits_BKV.dtype, torch.float32)
    targets_BK = targets_BT.gather(1, place_BK)
    nll_BK = F.cross_entropy(
        logits_BKV.flatten(0, 1).to(wide), targets_BK.flatten(), ignore_index=IGNORE, reduction="none"
    ).view_as(targets_BK)
    return nll_BK.sum(dim=1) / counts_B.clamp(min=1)


class PerExampleGradients:
    """Adds up the gradients of a step's examples, each clipped to ``clip_norm``.

    ``per_sample`` holds the gradient of every example of a micro-batch; ``ghost`` computes their norms alone and then
    the gradient of the loss whose terms are weighted by them (Li et al., 2022), in a second backward pass.

    Raises UserError where ``ghost`` cannot be right: a weight that several layers share, unless these are the input
    embedding and the head.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        *,
        clip_norm: float,
        clipping: Literal["per_sample", "ghost"],
    ) -> None:
        self._model, self._parameters, self._clip_norm = model, parameters, clip_norm
        self._ghost = clipping == "ghost"
        self._tie = _tied_pair(model) if self._ghost else None
        self._checked_rows = 0

    def optimizer(self, optimizer: Optimizer, *, noise_multiplier: float, generator: torch.Generator | None) -> Any:
        """Opacus' optimizer for one step, around ``optimizer``: it holds the sum that :meth:`add` adds to."""
        kind = DPOptimizerFastGradientClipping if self._ghost else DPOptimizer
        return kind(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=self._clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",
            generator=generator,
        )

    def add(self, batch: Batch, optimizer: Any, call: Call) -> Tensor:
        """Add the clipped gradients of ``batch`` to the sum of ``optimizer``; the examples' losses, shape [B].

        ``call(function, *args)`` runs ``function(model, *args)`` (:meth:`isoray.training.parallel.Parallel.call`).
        Raises UserError for a model whose examples Opacus does not tell apart.
        """
        if (rows := min(2, len(batch["labels"]))) > self._checked_rows:
            self._check(batch, rows, call)
            self._checked_rows = rows
        with self._hooks() as hooks:
            nll_B: Tensor = call(example_nll, batch)
            nll_B.sum().backward(retain_graph=self._ghost)  # type: ignore[no-untyped-call]
            if self._ghost:
                weights_B = hooks.get_clipping_coef()
                self._drop_gradients()
                hooks.disable_hooks()
                (nll_B * weights_B).sum().backward()
                optimizer.accumulate()
            else:
                optimizer.clip_and_accumulate()
        self._drop_gradients()
        return nll_B.detach()

    def _check(self, batch: Batch, rows: int, call: Call) -> None:
        """That the first ``rows`` of ``batch`` together have the gradient norms that each of them has alone."""
        with _without_dropout(self._model):
            examples = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(rows)]
            alone = [self._norm_alone(example, call) for example in examples]
            try:
                with self._hooks() as hooks:
                    call(example_nll, {name: tensor[:rows] for name, tensor in batch.items()}).sum().backward()
                    together = self._norms(hooks).tolist()
            except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                raise _unsupported(self._model, f"{type(error).__name__}: {error}") from error
            self._drop_gradients()
        if not torch.allclose(torch.tensor(together), torch.tensor(alone), rtol=TOLERANCE, equal_nan=True):
            raise _unsupported(
                self._model, f"its gradient norms of single examples are {together}, but should be {alone}"
            )

    def _norm_alone(self, example: Batch, call: Call) -> float:
        call(example_nll, example).sum().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        self._drop_gradients()
        return float(norm)

    def _norms(self, hooks: Any) -> Tensor:
        """Of the backward pass just made: shape [B]."""
        if self._ghost:
            norms_B: Tensor = hooks.get_norm_sample()
            return norms_B
        parameters: list[Any] = self._parameters
        squares_B: Tensor = torch.stack([p.grad_sample.flatten(1).square().sum(dim=1) for p in parameters]).sum(dim=0)
        return squares_B.sqrt()

    @contextmanager
    def _hooks(self) -> Iterator[Any]:
        """Opacus' hooks, on the model only inside the block: it is saved, copied and evaluated without them."""
        if self._ghost:
            hooks = _GhostHooks(self._model, loss_reduction="sum", max_grad_norm=self._clip_norm)
            hooks.tie = self._tie
        else:
            hooks = _SampleHooks(self._model, loss_reduction="sum")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Full backward hook is firing")  # at the embedding
                yield hooks
        finally:
            hooks.cleanup()

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


class _WithoutPadding:
    """PyTorch has no gradient for an embedding's ``padding_idx``, which may be a token of the text; Opacus has one."""

    hooks_enabled: bool

    def capture_backprops_hook(self, module: Any, inputs: Any, outputs: Any, **options: Any) -> None:
        if not self.hooks_enabled:  # the second pass of ghost clipping
            return
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            ids_BT: Tensor = module.activations[-1][0]  # type: ignore[index]
            outputs = (outputs[0].masked_fill((ids_BT == module.padding_idx)[..., None], 0),)
        super().capture_backprops_hook(module, inputs, outputs, **options)  # type: ignore[misc]


class _SampleHooks(_WithoutPadding, GradSampleHooks):  # type: ignore[misc]
    """The gradient of every example."""


class _TiedNorms(GradSampleHooksFastGradientClipping):  # type: ignore[misc]
    """The norm of every example's gradient, also where the head shares the embedding's weight (``tie``).

    Opacus takes the norms of the two uses by themselves, and refuses such models for that. The gradient is
    the sum of both, E + L, so ``|E + L|^2 = |E|^2 + |L|^2 + 2 <E, L>``. Both are sums of outer products, so that the
    last needs neither:
    ``<E, L> = sum over t, k of logit_gradient[k, token[t]] * (hidden[k] . embedding_gradient[t])``.
    """

    tie: tuple[nn.Embedding, nn.Linear] | None = None

    def capture_activations_hook(self, module: Any, inputs: Any, outputs: Any) -> None:
        if self.tie is not None and module is self.tie[1]:
            shared: Any = module.weight
            shared._forward_counter = 0  # else Opacus refuses the second use
        super().capture_activations_hook(module, inputs, outputs)

    def capture_backprops_hook(self, module: Any, inputs: Any, outputs: Any, **options: Any) -> None:
        if self.tie is None or module not in self.tie:
            super().capture_backprops_hook(module, inputs, outputs, **options)
            return
        embedding: Any = self.tie[0]
        grad, activations, ids_BT = outputs[0].detach(), module.activations[-1][0], embedding.activations[-1][0]
        super().capture_backprops_hook(module, inputs, outputs, **options)
        norm_B = module.weight._norm_sample
        if module is not embedding:  # the head, which comes first in the backward pass
            grad_BKT = grad.gather(2, ids_BT[:, None].expand(-1, grad.shape[1], -1))
            self._of_head = norm_B, activations, grad_BKT
            return
        head_norm_B, hidden_BKH, grad_BKT = self._of_head
        product_B = (grad_BKT * (hidden_BKH @ grad.mT)).sum(dim=(1, 2))
        module.weight._norm_sample = (head_norm_B**2 + norm_B**2 + 2 * product_B).clamp(min=0).sqrt()


class _GhostHooks(_WithoutPadding, _TiedNorms):
    """The norm of every example's gradient."""


def _grad_sample_of_conv1d(layer: Any, activations: list[Tensor], grad: Tensor) -> dict[nn.Parameter, Tensor]:
    """GPT-2's layers are linear ones whose weight is transposed; Opacus knows only the others."""
    samples: dict[nn.Parameter, Tensor] = compute_linear_grad_sample(layer, activations, grad)
    return {p: g.mT if p is layer.weight else g for p, g in samples.items()}


register_grad_sampler(Conv1D)(_grad_sample_of_conv1d)
register_norm_sampler(Conv1D)(compute_linear_norm_sample)  # a norm does not change by transposition


def _tied_pair(model: nn.Module) -> tuple[nn.Embedding, nn.Linear] | None:
    """The input embedding and the head where they share a weight that is trained; UserError for other sharing."""
    users: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                users.setdefault(parameter, []).append((name, module))
    pair = None
    for of in users.values():
        if len(of) > 1:
            modules = {type(module): module for _, module in of}
            embedding, head = modules.get(nn.Embedding), modules.get(nn.Linear)
            if len(of) > 2 or embedding is None or head is not head_of(model):
                raise UserError(
                    f"training.privacy.clipping is `ghost`, but {' and '.join(name for name, _ in of)} share a weight, "
                    "and only an input embedding and a head of the usual kind may; set it to `per_sample`, or train a "
                    "LoRA adapter (model.adapter)."
                )
            assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
            pair = embedding, head
    return pair


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, but for the flag by which Opacus' hooks see that a layer is trained."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    for module in training:
        module.training = any(p.requires_grad for p in module.parameters(recurse=False))
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _unsupported(model: nn.Module, why: str) -> UserError:
    return UserError(
        f"training.privacy: the gradients of single examples cannot be told apart in a {type(plain(model)).__name__} "
        f"({why}). Train a LoRA adapter (model.adapter) instead of all weights."
    )
