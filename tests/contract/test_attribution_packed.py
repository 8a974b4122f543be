"""Hessian products through isoray's own loss and its block-diagonal attention."""

from __future__ import annotations

import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from isoray.attribution.gradient import split, summed_gradient, trainable
from isoray.attribution.hessian import MeanHessian
from isoray.objectives.reduce import example_nll_sum


def test_products_through_isorays_own_loss_on_packed_blocks() -> None:
    """Against finite differences of the gradient; two documents in the first block, padding in the second."""
    torch.manual_seed(0)
    # GPT-2 and not Llama, whose norms compute in float32 even in a float64 model.
    shape = GPT2Config(vocab_size=11, bos_token_id=0, eos_token_id=0, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(shape).double()
    input_ids = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(1))
    labels = input_ids.clone()
    labels[0, 0] = labels[0, 3] = labels[1, 0] = labels[1, 4:] = -100
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 0]])
    batch = {"input_ids": input_ids, "labels": labels, "segment_ids": segments, "position_ids": positions}
    hessian = MeanHessian(
        model, [{k: v[i : i + 1] for k, v in batch.items()} for i in (0, 1)], example_nll_sum, examples=2
    )
    vector_P = hessian.random_normal(seed=3)
    product_P, step = hessian(vector_P), 1e-6
    ends = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, direction in zip(trainable(moved), split(vector_P, trainable(moved)), strict=True):
                parameter += sign * step * direction
        ends.append(summed_gradient(moved, [batch], example_nll_sum) / 2)
    torch.testing.assert_close(product_P, (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-6)
