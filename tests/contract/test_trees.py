"""Examples laid out as prefix trees have the losses and the gradients that they have alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from blocks import ListStore, document, packed, ragged, templates
from tiny import make_neox
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from isoray.attribution.gradient import summed_gradient
from isoray.attribution.hessian import MeanHessian
from isoray.corpora.store import Block
from isoray.corpora.stream import BlockStream
from isoray.evaluation.likelihood import SetLosses
from isoray.models.structure import drops_out
from isoray.objectives.reduce import Batch, example_nll_sum, is_tree, label_counts, row_nll
from isoray.training import trees
from isoray.training.batching import Layouter, MicroBatches, without_labels
from isoray.training.config import ComputeConfig
from isoray.training.parallel import Parallel, Ranks

SIZES = {
    "llama": {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32},
    "gpt2": {"n_layer": 2, "n_head": 2},
    "opt": {"num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "gpt_neox": {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "mamba": {"num_hidden_layers": 2, "state_size": 4},
    "gemma3_text": {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
}


def model_of(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=97, hidden_size=16, max_position_embeddings=512, **SIZES[kind])
    settings = {} if kind == "mamba" else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **settings).eval()
    for parameter in model.parameters():  # a fresh model hardly looks at what came before
        if parameter.dim() > 1:
            parameter.data.mul_(10)
    return model


def alone(model: nn.Module, blocks: Sequence[Block]) -> float:
    """The slow way: one pass per example, mean of means."""
    means = []
    for block in blocks:
        batch = {
            "input_ids": torch.tensor(block.input_ids).long()[None],
            "labels": torch.tensor(block.labels).long()[None],
        }
        with torch.no_grad():
            nll_B, count_B = row_nll(model, batch)
        means.append(float(nll_B / count_B))
    return float(np.mean(means))


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how many trees were planted for each set."""
    planted: list[int] = []
    plant = trees.plant

    def spy(*args: object, **kwargs: object) -> list[trees.Tree] | None:
        found = plant(*args, **kwargs)  # type: ignore[arg-type]
        planted.append(len(found or ()))
        return found

    monkeypatch.setattr(trees, "plant", spy)
    return planted


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox"])
def test_losses_are_those_of_single_examples(kind: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "WIDTH", 60)  # several trees, several to a batch
    planted = spied(monkeypatch)
    model = model_of(kind, attention)
    sets = {"a": templates("a", 40, seed=1), "b": templates("b", 10, seed=2)}
    losses = SetLosses(sets, pad_token_id=0, max_tokens=130)
    got = losses(Parallel(model))
    assert planted[0] > 2
    for name, store in sets.items():
        # Transformers' eager attention takes its softmax in float32 whatever the model's type.
        assert got[name] == pytest.approx(alone(model, store.blocks), rel=1e-12 if attention == "sdpa" else 1e-8)
    assert losses(Parallel(model)) == got


def test_average_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = spied(monkeypatch)
    model, store = model_of("llama"), templates("a", 20, seed=1)
    got = SetLosses({"a": store}, pad_token_id=0, average="token", max_tokens=512)(Parallel(model))["a"]
    assert planted == [1]
    monkeypatch.setattr(trees, "supported", lambda _: False)
    plain = SetLosses({"a": store}, pad_token_id=0, average="token", max_tokens=512)(Parallel(model))["a"]
    assert got == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("kind", ["mamba", "gemma3_text"])
def test_models_that_mix_positions_otherwise_are_left_alone(kind: str) -> None:
    model, store = model_of(kind, dtype=torch.float32), templates("a", 10, seed=1)
    assert not trees.supported(Parallel(model))
    got = SetLosses({"a": store}, pad_token_id=0, max_tokens=512)(Parallel(model))["a"]
    assert got == pytest.approx(alone(model, store.blocks), rel=1e-5)


def test_a_model_that_ignores_the_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", dtype=torch.float32)
    forward = model.model.forward

    def careless(*args: object, attention_mask: object = None, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", careless)
    assert not trees.supported(Parallel(model))


def test_only_what_begins_alike_is_planted() -> None:
    assert trees.plant([document(20, seed=n) for n in range(8)]) is None, "nothing is shared"
    assert trees.plant(templates("a", 20, seed=1).blocks) is not None
    long = [document(trees.WIDTH + 1, seed=0)] * 4
    assert trees.plant(long) is None
    two = packed([document(5, seed=0), document(5, seed=1)])
    assert trees.plant([two] * 4) is None


def test_ranks_share_the_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of two ranks, taken one after the other, are those of one."""
    monkeypatch.setattr(trees, "WIDTH", 60)
    model, store = model_of("llama"), templates("a", 40, seed=1)
    shares: list[torch.Tensor] = []
    monkeypatch.setattr(Ranks, "sum", lambda self, tensor: shares.append(tensor.clone()) or tensor)
    whole = SetLosses({"a": store}, pad_token_id=0, max_tokens=60)(Parallel(model))["a"]
    shares.clear()
    for rank in range(2):
        ranks = Ranks(rank, 2, torch.device("cpu"))
        with np.errstate(all="ignore"):
            SetLosses({"a": store}, pad_token_id=0, max_tokens=60, ranks=ranks)(Parallel(model))
    nll_R, count_R = sum(shares).numpy()
    assert all(share[1].any() for share in shares)
    assert (nll_R / count_R).mean() == pytest.approx(whole, rel=1e-12)


def both_ways(store: ListStore) -> tuple[list[Batch], list[Batch]]:
    """Micro-batches of a store as prefix trees, and as rows."""
    layouter = Layouter(ComputeConfig(micro_batch_tokens=130), Ranks(), pad_token_id=0, layout="causal")
    planted = layouter.as_trees(store.blocks)
    assert planted is not None
    return planted, list(layouter.as_rows(store.lengths, lambda rows: [store[row] for row in rows]))


def test_gradients_and_hessians_are_those_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "WIDTH", 60)
    model, store = make_neox(), templates("a", 30, seed=1)
    planted, rows = both_ways(store)
    assert sum(b["input_ids"].numel() for b in planted) < 0.8 * sum(b["input_ids"].numel() for b in rows)
    assert sum(len(label_counts(batch)) for batch in planted) == len(store)
    got, want = (summed_gradient(model, batches, example_nll_sum) for batches in (planted, rows))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    vector = torch.randn(len(got), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got, want = (MeanHessian(model, batches, example_nll_sum, len(store))(vector) for batches in (planted, rows))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_a_bound_of_rows_bounds_the_tokens_of_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "WIDTH", 60)
    store = templates("a", 60, seed=1)
    layouter = Layouter(ComputeConfig(), Ranks(), pad_token_id=0, layout="causal")
    sizes = {}
    for rows in (None, 4, 1):
        planted = layouter.as_trees(store.blocks, max_rows=rows)
        assert planted is not None
        sizes[rows] = max(batch["input_ids"].numel() for batch in planted)
    longest = int(store.lengths.max())
    assert sizes[1] <= 60 < sizes[4] <= 4 * longest < sizes[None]


def test_every_rank_has_its_part_or_there_are_no_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    store = templates("a", 40, seed=1)
    for width, shared in ((60, True), (256, False)):
        monkeypatch.setattr(trees, "WIDTH", width)
        assert (len(trees.plant(store.blocks) or ()) > 1) == shared
        counted = 0
        for rank in range(2):
            ranks = Ranks(rank, 2, torch.device("cpu"))
            planted = Layouter(ComputeConfig(), ranks, pad_token_id=0, layout="causal").as_trees(store.blocks)
            assert (planted is not None) == shared
            counts = [int(label_counts(batch).sum()) for batch in planted or ()]
            assert not shared or sum(counts) > 0
            counted += sum(counts)
        expected = sum(int((block.labels[1:] != -100).sum()) for block in store.blocks)
        assert not shared or counted == expected


def test_without_labels_nothing_is_counted_but_the_parameters_take_part() -> None:
    model = model_of("llama")
    for batches in both_ways(templates("a", 30, seed=1)):
        bare = without_labels(batches[0])
        loss = example_nll_sum(model, bare)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert not label_counts(bare).any()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("alike", "able"), [(True, True), (True, False), (False, True)])
def test_steps_are_planted_where_rows_begin_alike_and_the_model_can(alike: bool, able: bool) -> None:
    store = templates("a", 30, seed=1) if alike else ragged("a", 30, seed=1)
    layouter = Layouter(ComputeConfig(), Ranks(), pad_token_id=0, layout="causal")
    stream = BlockStream([store], batch_size=len(store), seed=0)
    batches = MicroBatches({"train": stream}, layouter, with_trees=lambda: able)
    for step in (0, 1):
        assert all(is_tree(micro_batch["train"]) == (alike and able) for micro_batch in batches.at(step))


def test_dropout_is_noticed() -> None:
    assert not drops_out(make_neox())
    assert drops_out(model_of("gpt2"))
    config = AutoConfig.for_model("llama", vocab_size=97, hidden_size=16, attention_dropout=0.1, **SIZES["llama"])
    assert drops_out(AutoModelForCausalLM.from_config(config))
