"""Two things that make a decoding step quick: attention that reads a shared head once, and packed weights on CPUs.

Both compute what Transformers computes, up to rounding, and both are in force only while an engine runs the model: for
anyone else who holds it, it is as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

GROUPED = "isoray_grouped_sdpa"
"""Name of the attention implementation that this module registers with Transformers."""
PACKED_ROWS = 16
"""Number of rows that the layout of packed weights is chosen for; they serve any number."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' ``sdpa`` attention for one query per row [B, heads, 1, D], which copies no keys and values.

    Transformers repeats keys and values [B, key heads, T, D] for every query head where there is a mask, since some
    kernels demand it; for a single query none does.
    """
    rows, heads, length, size = query.shape
    groups = heads // key.shape[1]
    by_head = kwargs.get("position_bias") is not None or (attention_mask is not None and attention_mask.shape[1] > 1)
    if length > 1 or groups == 1 or by_head:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    if query.device.type == "cpu":
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
    else:
        # The query heads that share a key head take the place of several queries.
        grouped = query.reshape(rows, key.shape[1], groups, size)
        out = functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
    return out.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """All ``modules`` of a model in evaluation mode, so that nothing is dropped; then as before."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Quickened:
    """A model that decodes quickly inside ``with quickened.running():``, and is as it was outside."""

    def __init__(self, model: PreTrainedModel, *, packed: bool) -> None:
        """``packed``: float32 linear layers on the CPU get a copy of their weights in oneDNN's own layout.

        A product of a few rows is quicker with it, as MKL, which torch asks otherwise, is made for many rows. It costs
        as much memory as those weights take, and a pass over them after each :meth:`forget`.
        """
        self._modules = list(model.modules())
        self._config: Any = model.config
        self._grouped = model._can_set_attn_implementation() and self._config._attn_implementation == "sdpa"
        packs = packed and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._layers = [_Packed(module) for module in self._modules if packs and _can_pack(module)]

    @contextmanager
    def running(self) -> Iterator[None]:
        """While it is open, whoever runs the model runs it quickly."""
        if self._grouped:
            self._config._attn_implementation = GROUPED
        for layer in self._layers:
            vars(layer.module)["forward"] = layer
        try:
            with evaluating(self._modules):
                yield
        finally:
            for layer in self._layers:
                del vars(layer.module)["forward"]
            if self._grouped:
                self._config._attn_implementation = "sdpa"

    def forget(self) -> None:
        """Drop packed weights: the model's own may have changed. They are packed anew when they are next used."""
        for layer in self._layers:
            layer.packed = None


def _can_pack(module: nn.Module) -> bool:
    if type(module) not in (nn.Linear, Conv1D) or "forward" in vars(module):
        return False
    weight = cast(Tensor, module.weight)
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and not weight.is_inference()


class _Packed:
    """The forward pass of a linear layer with packed weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            weight = cast(Tensor, self.module.weight).detach()
            rows_of = weight if isinstance(self.module, nn.Linear) else weight.t().contiguous()
            self.packed = torch.ops.mkldnn._reorder_linear_weight(rows_of, PACKED_ROWS)
        bias = cast("Tensor | None", self.module.bias)
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], ""))
