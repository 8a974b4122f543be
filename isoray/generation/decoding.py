"""Two things that make a decoding step quick: attention that reads a shared head once, and packed weights on CPUs.

Both compute what Transformers computes, up to rounding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
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
    if length > 1 or groups == 1 or kwargs.get("position_bias") is not None:
        return cast(
            "tuple[Tensor, None]",
            sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            ),
        )
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


def pack(model: nn.Module) -> None:
    """Give the float32 linear layers of a model on the CPU a copy of their weights in oneDNN's own layout.

    A product of a few rows takes a third to a half of the time with it, as MKL, which torch asks otherwise, is made for
    many rows. Where gradients are wanted the layers compute as ever; a weight that has changed is packed anew before it
    is next used. Costs as much memory as those weights take.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D):
            weight = cast(Tensor, module.weight)
            if weight.dtype == torch.float32 and weight.device.type == "cpu" and not weight.is_inference():
                module.forward = _Packed(module)  # type: ignore[method-assign]


def unpack(model: nn.Module) -> None:
    """Undo :func:`pack`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), _Packed):
            del module.forward


class _Packed:
    """The forward pass of a linear layer with packed weights."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._plain = module.forward
        self._packed: Tensor | None = None
        self._made_from: tuple[int, int] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return cast(Tensor, self._plain(x))
        weight = cast(Tensor, self._module.weight)
        state = (weight.data_ptr(), weight._version)
        if state != self._made_from:
            rows_of = weight.detach() if isinstance(self._module, nn.Linear) else weight.detach().t().contiguous()
            self._packed = torch.ops.mkldnn._reorder_linear_weight(rows_of, PACKED_ROWS)
            self._made_from = state
        bias = cast("Tensor | None", self._module.bias)
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], ""))
