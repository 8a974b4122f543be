"""The only masked reductions: negative log-likelihoods at labelled positions, as sums and counts.

A batch is a mapping of tensors made by :func:`isoray.corpora.collate.collate`. Causal batches hold ``input_ids_BT`` and
``labels_BT`` (unshifted, -100 = no loss); packed ones also ``position_ids_BT`` and ``segment_ids_BT``. Encoder-decoder
batches hold ``attention_mask_BS`` and decoder labels. The head is computed at labelled positions only, in chunks, in
float32 or wider; nothing of the shape batch x time x vocabulary is ever made when the model's structure is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoray.errors import UserError
from isoray.models.structure import decoder_and_head, logits_at

IGNORE = -100
"""The label of a position that has no loss (PyTorch's and Transformers' convention)."""

HEAD_CHUNK = 2048
"""Labelled positions whose logits are computed at once when no gradient is needed."""

Batch = Mapping[str, Tensor]


class TokenNll(NamedTuple):
    """NLL of every labelled token of a batch."""

    nll_N: Tensor
    """float32 (float64 for float64 models), shape [N], nats."""
    row_N: Tensor
    """int64, shape [N]: the batch row each token belongs to."""


def is_seq2seq(batch: Batch) -> bool:
    """Whether the batch has an encoder side of its own (see :func:`isoray.corpora.collate.collate`)."""
    return "attention_mask" in batch


def label_counts(batch: Batch) -> Tensor:
    """Number of labelled tokens in each row: int64, shape [B]."""
    labels = batch["labels"] if is_seq2seq(batch) else batch["labels"][:, 1:]
    return (labels != IGNORE).sum(dim=1)


def token_nll(model: nn.Module, batch: Batch) -> TokenNll:
    """Negative log-likelihood of every labelled token, flat over the batch.

    A batch without labelled tokens gives empty tensors that still hang on the parameters, so that every rank of a
    distributed step takes part in the backward pass.
    """
    if is_seq2seq(batch):
        hf_model: Any = model
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "decoder_input_ids": hf_model.prepare_decoder_input_ids_from_labels(labels=batch["labels"]),
        }
        keep_BT, targets_BT = batch["labels"] != IGNORE, batch["labels"]
    else:
        inputs = {"input_ids": batch["input_ids"], **_attention(model, batch)}
        targets_BT = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)  # position t predicts token t + 1
        keep_BT = targets_BT != IGNORE
    inputs["use_cache"] = False
    targets_N, row_N = targets_BT[keep_BT], keep_BT.nonzero()[:, 0]
    if torch.is_grad_enabled() or len(targets_N) <= HEAD_CHUNK or (structure := decoder_and_head(model)) is None:
        return TokenNll(_cross_entropy(logits_at(model, inputs, keep_BT), targets_N), row_N)
    backbone, head = structure
    hidden_NH = backbone(**inputs)[keep_BT]
    pieces = zip(torch.split(hidden_NH, HEAD_CHUNK), torch.split(targets_N, HEAD_CHUNK), strict=True)
    return TokenNll(torch.cat([_cross_entropy(head(hidden), targets) for hidden, targets in pieces]), row_N)


def row_nll(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed NLL and number of labelled tokens of each row: ``(sum_B, count_B)``, float32 (or wider) and int64."""
    nll_N, row_N = token_nll(model, batch)
    counts_B = label_counts(batch)
    return nll_N.new_zeros(len(counts_B)).index_add(0, row_N, nll_N), counts_B


def example_nll_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over the batch's examples of each example's mean token NLL: a scalar, additive over micro-batches.

    An example is a row; the loss of an example is the mean over its labelled tokens (UnTrac, section 3). Rows without
    labels count nothing.
    """
    sum_B, count_B = row_nll(model, batch)
    return (sum_B / count_B.clamp(min=1)).sum()


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return F.cross_entropy(wide, targets_N, reduction="none")


def _attention(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Inputs that keep packed documents apart: restarting positions and a block-diagonal causal mask.

    Right padding needs neither: under causal attention no labelled token sees it.
    """
    if "segment_ids" not in batch:
        return {}
    segments_BT = batch["segment_ids"]
    length = segments_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    allowed_BTT = (segments_BT[:, :, None] == segments_BT[:, None, :]) & causal_TT
    mask_BHTT = allowed_BTT[:, None]
    config = getattr(model, "config", None)
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        raise UserError(
            f"packed blocks of {length} tokens are longer than the model's attention window of {window}: set "
            f"corpora.length to at most {window}, or corpora.packing to false."
        )
    if getattr(config, "_attn_implementation", "sdpa") != "sdpa":  # added to the scores there; sdpa takes "may attend"
        dtype = next(model.parameters()).dtype
        mask_BHTT = torch.zeros_like(mask_BHTT, dtype=dtype).masked_fill(~mask_BHTT, torch.finfo(dtype).min)
    return {"attention_mask": mask_BHTT, "position_ids": batch["position_ids"]}
