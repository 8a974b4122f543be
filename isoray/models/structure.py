"""What the objectives need to know of a model's inside: where its head is, so that it runs at labelled positions only.

Logits of a whole batch are the largest tensor of a training step (batch x time x vocabulary); a loss needs them where
there are labels. :func:`logits_at` works for every Transformers language model and keeps whatever wraps it (DDP, FSDP,
``torch.compile``) in charge of the forward pass. :func:`decoder_and_head` splits a plain model in two, for losses that
apply the head piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

_splits: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def plain(model: nn.Module) -> PreTrainedModel:
    """The Transformers model inside DDP, ``torch.compile`` and PEFT wrappers (PEFT's layers stay in it)."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, PeftModel):
            inner = inner.get_base_model()
        elif isinstance(wrapped := getattr(inner, "_orig_mod", getattr(inner, "module", None)), nn.Module):
            inner = wrapped
        else:
            raise TypeError(f"{type(inner).__name__} holds no Transformers model")
    return inner


def logits_at(model: nn.Module, inputs: Mapping[str, Any], keep_BT: Tensor) -> Tensor:
    """Logits at the positions where ``keep_BT`` (bool) is true, in row-major order: shape [N, V], the model's dtype.

    The same values as ``model(**inputs).logits[keep_BT]``, but the head sees N positions instead of B x T. Scales and
    soft caps that a model applies after its head are elementwise, so they still hold. For an encoder-decoder,
    ``keep_BT`` runs over decoder positions.
    """
    # A compiled model ignores hooks that were added after its compilation: its logits then come back whole.
    hook = head_of(model).register_forward_pre_hook(lambda _, args: (args[0][keep_BT],))
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        hook.remove()
    return logits if logits.dim() == 2 else logits[keep_BT]


def head_of(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits; TypeError for a model without one."""
    head = _output_embeddings(plain(model))
    if head is None:
        raise TypeError(f"{type(plain(model)).__name__} has no language-modelling head")
    return head


def decoder_and_head(model: nn.Module) -> tuple[Callable[..., Tensor], nn.Module] | None:
    """``(backbone, head)`` with ``head(backbone(**inputs)) == model(**inputs).logits``, or None.

    ``backbone`` takes the model's inputs and returns hidden states [B, T, H]. None where the equality does not hold
    (soft-capped or scaled logits, T5) and for wrapped or sharded models, whose own forward pass must run: use
    :func:`logits_at` there. The equality is tried once per model on two tokens; the answer is remembered.
    """
    if not isinstance(model, PreTrainedModel | PeftModel):
        return None
    inner = plain(model)
    head = _output_embeddings(inner)
    body = inner.base_model
    if head is None or body is inner or inner.config.is_encoder_decoder:
        return None

    def backbone(**inputs: Any) -> Tensor:
        return cast(Tensor, body(**inputs)[0])

    if model not in _splits:
        _splits[model] = _splits_cleanly(model, backbone, head)
    return (backbone, head) if _splits[model] else None


def drops_out(model: nn.Module) -> bool:
    """Whether some module, attention included, drops values at random while it trains."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return True
        # Attention keeps its rate as a number.
        if any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items()):
            return True
    return False


def _output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    return cast("nn.Module | None", cast(Any, model).get_output_embeddings())


def _splits_cleanly(model: nn.Module, backbone: Callable[..., Tensor], head: nn.Module) -> bool:
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return False
    device = next(head.parameters()).device
    probe = {"input_ids": torch.tensor([[0, 1]], device=device), "use_cache": False}
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would make the two passes differ, and must not use up the caller's random numbers
    try:
        with torch.no_grad():
            logits = model(**probe).logits
            # Bit for bit: a soft cap changes the small logits of a fresh model by less than any tolerance.
            return torch.equal(head(backbone(**probe)).to(logits.dtype), logits)
    finally:
        for module in training:
            module.training = True
