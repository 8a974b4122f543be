"""The only masked reductions: negative log-likelihoods at labelled positions, as sums and counts.

A batch is a mapping of tensors made by :func:`isoray.corpora.collate.collate`. Causal batches hold ``input_ids_BT`` and
``labels_BT`` (unshifted, -100 = no loss); packed ones also ``position_ids_BT`` and ``segment_ids_BT``. Encoder-decoder
batches hold ``attention_mask_BS`` and decoder labels. Rows that begin alike may come as prefix trees
(:mod:`isoray.training.trees`); they count as the rows that they are made of. The head is computed at labelled positions
only, in chunks, in float32 or wider; nothing of the shape batch x time x vocabulary is ever made when the model's
structure is known.
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

HEAD_CHUNK = 256
"""Labelled positions whose logits are computed at once when no gradient is needed, to bound memory: all positions of a
pass take more than its activations where the vocabulary is large."""

Batch = Mapping[str, Tensor]


class TokenNll(NamedTuple):
    """NLL of every labelled token of a batch."""

    nll_N: Tensor
    """float32 (float64 for float64 models), shape [N], nats."""
    row_N: Tensor
    """int64, shape [N]: the row (of trees: the example) each token belongs to."""


def is_seq2seq(batch: Batch) -> bool:
    """Whether the batch has an encoder side of its own (see :func:`isoray.corpora.collate.collate`)."""
    return "attention_mask" in batch


def is_tree(batch: Batch) -> bool:
    """Whether the batch's rows are laid out as prefix trees."""
    return "subtree_ends" in batch


def label_counts(batch: Batch) -> Tensor:
    """Number of labelled tokens in each row: int64, shape [B]."""
    if is_tree(batch):
        return batch["counts"]
    labels = batch["labels"] if is_seq2seq(batch) else batch["labels"][:, 1:]
    return (labels != IGNORE).sum(dim=1)


def token_nll(model: nn.Module, batch: Batch) -> TokenNll:
    """Negative log-likelihood of every labelled token, flat over the batch.

    A batch without labelled tokens gives empty tensors that still hang on the parameters, so that every rank of a
    distributed step takes part in the backward pass.
    """
    if is_tree(batch):
        return TokenNll(_tree_nll(model, batch), batch["owners"])
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
    targets_N, row_N = targets_BT[keep_BT], keep_BT.nonzero()[:, 0]
    return TokenNll(_nll_at(model, inputs, keep_BT, targets_N), row_N)


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


def _tree_nll(model: nn.Module, tree: Batch) -> Tensor:
    """NLL of every labelled token of rows laid out as prefix trees: shape [N]."""
    length = tree["input_ids"].shape[1]
    place_T = torch.arange(length, device=tree["input_ids"].device)
    # A position sees itself and its ancestors: those before it whose subtree has not ended.
    allowed_BTT = (place_T[:, None] >= place_T) & (place_T[:, None] < tree["subtree_ends"][:, None, :])
    inputs = {
        "input_ids": tree["input_ids"],
        "position_ids": tree["position_ids"],
        "attention_mask": _mask(model, allowed_BTT),
    }
    return _nll_at(model, inputs, tree["predicts"], tree["targets"], which_N=tree["predictors"])


def _nll_at(
    model: nn.Module, inputs: dict[str, Any], keep_BT: Tensor, targets_N: Tensor, which_N: Tensor | None = None
) -> Tensor:
    """NLL of ``targets_N``; the n-th is predicted at the n-th position of ``keep_BT``, or at the ``which_N[n]``-th."""
    inputs["use_cache"] = False
    if torch.is_grad_enabled() or len(targets_N) <= HEAD_CHUNK or (structure := decoder_and_head(model)) is None:
        logits_NV = logits_at(model, inputs, keep_BT)
        return _cross_entropy(logits_NV if which_N is None else logits_NV[which_N], targets_N)
    backbone, head = structure
    hidden_NH = backbone(**inputs)[keep_BT]
    hidden_NH = hidden_NH if which_N is None else hidden_NH[which_N]
    pieces = zip(torch.split(hidden_NH, HEAD_CHUNK), torch.split(targets_N, HEAD_CHUNK), strict=True)
    return torch.cat([_cross_entropy(head(hidden), targets) for hidden, targets in pieces])


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
    config = getattr(model, "config", None)
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        raise UserError(
            f"packed blocks of {length} tokens are longer than the model's attention window of {window}: set "
            f"corpora.length to at most {window}, or corpora.packing to false."
        )
    return {"attention_mask": _mask(model, allowed_BTT), "position_ids": batch["position_ids"]}


def _mask(model: nn.Module, allowed_BTT: Tensor) -> Tensor:
    """What the model's attention takes for "may attend": shape [B, 1, T, T]."""
    mask_BHTT = allowed_BTT[:, None]
    if getattr(getattr(model, "config", None), "_attn_implementation", "sdpa") == "sdpa":
        return mask_BHTT
    dtype = next(model.parameters()).dtype  # added to the scores
    return torch.zeros_like(mask_BHTT, dtype=dtype).masked_fill(~mask_BHTT, torch.finfo(dtype).min)
