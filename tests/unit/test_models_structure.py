"""Packing through masks, and the split of a model into backbone and head, on tiny random models in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from isoray.models.structure import decoder_and_head, logits_at, plain

VOCAB = 97
LLAMA_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
    },
    "gpt_neox": {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"},
}
AWKWARD: dict[str, dict[str, Any]] = {
    "gemma2": LLAMA_LIKE | {"head_dim": 8},  # soft-capped logits
    "cohere": LLAMA_LIKE,  # scaled logits
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


def tiny(kind: str, *, attention: str = "sdpa", **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attention, dtype=torch.float64).eval()
    for parameter in model.parameters():  # far from the nearly linear region of a fresh model
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def lora(model: PreTrainedModel) -> Any:
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).double().eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


def random_ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", CAUSAL)
def test_packed_rows_equal_separate_rows(kind: str) -> None:
    model = tiny(kind, **CAUSAL[kind])
    lengths = [7, 11, 5]
    ids_BT = random_ids(2, sum(lengths))
    segment_T = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    position_T = torch.cat([torch.arange(n) for n in lengths])
    allowed_TT = (segment_T[:, None] == segment_T) & torch.ones(23, 23, dtype=torch.bool).tril()
    packed = model(
        input_ids=ids_BT,
        position_ids=position_T.expand(2, -1),
        attention_mask=allowed_TT.expand(2, 1, -1, -1),
        use_cache=False,
    ).logits
    separate = torch.cat([model(input_ids=piece, use_cache=False).logits for piece in ids_BT.split(lengths, dim=1)], 1)
    assert (packed - separate).abs().max() < 1e-10

    weights = torch.randn(packed.shape, dtype=packed.dtype, generator=torch.Generator().manual_seed(2))
    gradients = [
        torch.autograd.grad((logits * weights).sum(), list(model.parameters())) for logits in (packed, separate)
    ]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 1e-10 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_head_of_backbone_is_the_model(kind: str, adapted: bool) -> None:
    model: Any = tiny(kind, **CAUSAL[kind])
    if adapted:
        model = lora(model)
    split = decoder_and_head(model)
    assert split is not None
    backbone, head = split
    inputs = {"input_ids": random_ids(2, 9), "use_cache": False}
    assert torch.equal(head(backbone(**inputs)), model(**inputs).logits)


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("scale", [0.3, 1e-3], ids=["large", "small"])
def test_no_split_where_logits_are_changed_after_the_head(kind: str, scale: float) -> None:
    model = tiny(kind, attention="eager", **AWKWARD[kind])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    assert decoder_and_head(model) is None


def test_no_split_of_t5_and_of_wrapped_models() -> None:
    assert decoder_and_head(tiny("t5", **T5)) is None
    assert decoder_and_head(torch.nn.DataParallel(tiny("gpt2", **CAUSAL["gpt2"]))) is None


def test_the_probe_leaves_modes_and_random_numbers_alone() -> None:
    model = tiny("gpt2", **CAUSAL["gpt2"]).train()
    frozen = model.transformer.h[0].eval()
    state = torch.get_rng_state()
    assert decoder_and_head(model) is not None
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and not frozen.training and model.transformer.h[1].training


MODELS = {**CAUSAL, **AWKWARD, "t5": T5, "t5 untied": T5 | {"tie_word_embeddings": False}}


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_at_some_positions(name: str, adapted: bool) -> None:
    kind = name.removesuffix(" untied")
    model: Any = tiny(kind, attention="eager" if kind in AWKWARD else "sdpa", **MODELS[name])
    if adapted:
        model = lora(model)
    inputs: dict[str, Any] = {"input_ids": random_ids(2, 9), "use_cache": False}
    if kind == "t5":
        inputs["decoder_input_ids"] = random_ids(2, 9)
    keep_BT = torch.rand(2, 9, generator=torch.Generator().manual_seed(3)) < 0.4
    expected = model(**inputs).logits[keep_BT]
    found = logits_at(model, inputs, keep_BT)
    assert found.shape == (int(keep_BT.sum()), VOCAB)
    assert (found - expected).abs().max() < 1e-10
    assert model(**inputs).logits.shape == (2, 9, VOCAB), "the hook must be gone"


def test_logits_at_no_position_keeps_the_graph() -> None:
    model = tiny("llama", **CAUSAL["llama"])
    inputs = {"input_ids": random_ids(2, 5), "use_cache": False}
    logits = logits_at(model, inputs, torch.zeros(2, 5, dtype=torch.bool))
    assert logits.shape == (0, VOCAB)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_logits_at_runs_the_head_on_kept_positions_only_even_when_wrapped() -> None:
    model = tiny("llama", **CAUSAL["llama"])
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    keep_BT = torch.zeros(2, 5, dtype=torch.bool)
    keep_BT[0, 1] = keep_BT[1, 3] = True
    wrapped = torch.nn.DataParallel(model)
    logits_at(wrapped, {"input_ids": random_ids(2, 5), "use_cache": False}, keep_BT)
    assert seen == [torch.Size([2, VOCAB])]
    assert plain(wrapped) is model


def test_logits_at_of_a_model_compiled_before() -> None:
    model = tiny("llama", **CAUSAL["llama"])
    compiled: Any = torch.compile(model, backend="eager")
    inputs = {"input_ids": random_ids(2, 5), "use_cache": False}
    whole = compiled(**inputs).logits
    keep_BT = torch.rand(2, 5, generator=torch.Generator().manual_seed(3)) < 0.4
    assert (logits_at(compiled, inputs, keep_BT) - whole[keep_BT]).abs().max() < 1e-10


def test_a_module_without_a_language_model_is_refused() -> None:
    with pytest.raises(TypeError, match="no Transformers model"):
        plain(torch.nn.Linear(2, 2))
