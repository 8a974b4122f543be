"""Summed gradients: against a loop over single examples, however batched, and as the limit of one UnTrac step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from isoray.attribution.gradient import Batch, save_gradient, split, summed_gradient, trainable
from isoray.attribution.scores import grad_cos, grad_dot
from isoray.attribution.vectors import open_vector
from isoray.errors import NumericError, UserError

VOCAB = 13


def loss_sums(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over examples of their mean token NLL, for examples of different lengths."""
    logits_BTV = model(input_ids=batch["input_ids"], attention_mask=(batch["labels"] != -100).long()).logits[:, :-1]
    labels_BT = batch["labels"][:, 1:]
    nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none", ignore_index=-100)
    return (nll_BT.sum(1) / (labels_BT != -100).sum(1)).sum()


def language_model(kind: str = "gpt2") -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
        )
        return LlamaForCausalLM(config)
    config = GPT2Config(
        vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, n_positions=16, n_embd=8, n_layer=2, n_head=2
    )  # with dropout 0.1
    return GPT2LMHeadModel(config).double()


def examples(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def batches(rows: list[Tensor], size: int) -> list[Batch]:
    """Right-padded micro-batches of ``size`` examples, the last one perhaps smaller."""
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        found.append(
            {
                "input_ids": nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=0),
                "labels": nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=-100),
            }
        )
    return found


def test_equals_a_loop_over_single_examples() -> None:
    model, rows = language_model(), examples(5, seed=1)
    model.eval()
    expected = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for row in rows:
        model.zero_grad()
        F.cross_entropy(model(input_ids=row[None]).logits[0, :-1], row[1:]).backward()
        expected += torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    gradient_P = summed_gradient(model, batches(rows, 2), loss_sums)
    assert gradient_P.dtype == torch.float64
    torch.testing.assert_close(gradient_P, expected, rtol=1e-10, atol=1e-12)


def test_does_not_depend_on_micro_batches_nor_on_the_models_mode() -> None:
    model, rows = language_model(), examples(7, seed=2)
    model.train()
    one = summed_gradient(model, batches(rows, 7), loss_sums)
    for size in (1, 2, 3):
        torch.testing.assert_close(summed_gradient(model, batches(rows, size), loss_sums), one, rtol=1e-10, atol=1e-12)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_llama_in_float32_and_bfloat16_gives_float32() -> None:
    model, rows = language_model("llama"), examples(4, seed=3)
    exact = summed_gradient(model, batches(rows, 4), loss_sums)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(summed_gradient(model, batches(rows, 1), loss_sums), exact, rtol=1e-4, atol=1e-5)
    coarse = summed_gradient(model.bfloat16(), batches(rows, 1), loss_sums)
    assert coarse.dtype == torch.float32
    assert F.cosine_similarity(coarse, exact, dim=0) > 0.99


def test_tied_weights_stand_once_and_frozen_ones_not_at_all() -> None:
    model, rows = language_model(), examples(3, seed=4)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(summed_gradient(model, batches(rows, 3), loss_sums)) == sum(p.numel() for p in set(model.parameters()))
    parameters = trainable(model)
    pieces = split(summed_gradient(model, batches(rows, 3), loss_sums), parameters)
    full = {id(parameter): piece for parameter, piece in zip(parameters, pieces, strict=True)}
    model.transformer.wpe.weight.requires_grad_(False)
    frozen = summed_gradient(model, batches(rows, 3), loss_sums)
    expected = torch.cat([full[id(parameter)].flatten() for parameter in trainable(model)])
    torch.testing.assert_close(frozen, expected, rtol=1e-10, atol=1e-12)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="unfreeze"):
        summed_gradient(model, batches(rows, 3), loss_sums)


def test_a_loss_that_is_not_finite_is_reported() -> None:
    model, rows = language_model(), examples(3, seed=5)
    with pytest.raises(NumericError, match="not finite"):
        summed_gradient(model, batches([*rows, rows[0][:1]], 2), loss_sums)  # one token: nothing to predict, 0 / 0


def test_grad_dot_is_one_step_of_untrac_and_of_untrac_inv(tmp_path: Path) -> None:
    """Ascend by one SGD step of size epsilon on a set, see how the other's loss rises."""
    epsilon = 1e-5
    train, test = batches(examples(6, seed=6), 3), batches(examples(4, seed=7), 2)

    def rise_after_ascent(ascend_on: list[Batch], measure_on: list[Batch]) -> float:
        model = language_model().eval()
        before = sum(loss_sums(model, batch).item() for batch in measure_on)
        optimizer = torch.optim.SGD(model.parameters(), lr=epsilon)
        for batch in ascend_on:
            (-loss_sums(model, batch)).backward()
        optimizer.step()
        return (sum(loss_sums(model, batch).item() for batch in measure_on) - before) / epsilon

    model = language_model()
    for name, rows in (("train", train), ("test", test)):
        save_gradient(model, rows, loss_sums, tmp_path / f"{name}.npy")
    score = grad_dot({"train": tmp_path / "train.npy"}, {"test": tmp_path / "test.npy"})["test"]["train"]
    assert score != pytest.approx(0.0, abs=1e-3)
    assert rise_after_ascent(train, test) == pytest.approx(score, rel=0.01)
    assert rise_after_ascent(test, train) == pytest.approx(score, rel=0.01)


def test_gradient_scores_put_the_test_set_itself_first_and_do_not_flip_sign(tmp_path: Path) -> None:
    """After training on a set, that set helps it most; larger = more helpful."""
    model = language_model().eval()
    test = [torch.tensor([1, 2, 3, 1, 2, 3]) + shift for shift in (0, 3, 6)]
    random = examples(3, seed=8)
    paths = {}
    for name, rows in {"same": test, "random": random}.items():
        paths[name] = tmp_path / f"{name}.npy"
        norm = save_gradient(model, batches(rows, 3), loss_sums, paths[name])
        assert norm == pytest.approx(np.linalg.norm(open_vector(paths[name])))
    for score in (grad_dot, grad_cos):
        scores = score(paths, {"test": paths["same"]})["test"]
        assert scores["same"] > 0
        assert scores["same"] > scores["random"]
