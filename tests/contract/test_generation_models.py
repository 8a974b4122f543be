"""The models of an engine: new weights, adapters, folders, and what cannot be contrasted."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import (
    PAIR,
    TOKENS,
    assert_as_slow,
    engine_of,
    mixed,
    some_prompts,
    tiny,
    tokenizer,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from isoray.errors import UserError
from isoray.generation.contrast import ContrastConfig
from isoray.generation.sampling import SamplingConfig
from isoray.generation.transformers import TransformersEngine
from isoray.models.adapters import add_adapter, merged
from isoray.models.config import AdapterConfig
from isoray.models.load import load, save

SAMPLING = SamplingConfig(max_tokens=12, eos="ignore")
PROMPTS = some_prompts(6)


pytestmark = pytest.mark.usefixtures("one_thread")


def generated(engine: TransformersEngine) -> list[tuple[int, ...]]:
    return [one.token_ids for one in engine.generate(PROMPTS, SAMPLING)]


def fresh(*models: PreTrainedModel, **settings: Any) -> list[tuple[int, ...]]:
    """What an engine made for these models gives."""
    with engine_of(*[copy.deepcopy(model) for model in models], **settings) as engine:
        return generated(engine)


def folders(tmp_path: Path, count: int = 2) -> list[Path]:
    found = [tmp_path / f"m{seed}" for seed in range(count)]
    for seed, folder in enumerate(found):
        save(tiny(seed, dtype=torch.float32), tokenizer(), folder)
    return found


def opened(contrast: ContrastConfig, **settings: Any) -> TransformersEngine:
    return TransformersEngine(TransformersEngine.Config(device="cpu", **settings), contrast)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_are_replaced_in_place(dtype: torch.dtype) -> None:
    old, new = [tiny(seed, dtype=dtype) for seed in (0, 1)], tiny(2, dtype=dtype)
    with engine_of(*old) as engine:
        before = generated(engine)
        engine.update("negative", new.state_dict())
        assert generated(engine) == fresh(old[0], new) != before
        one = "model.layers.1.mlp.down_proj.weight"
        engine.update("positive", {one: new.state_dict()[one]})
        changed = tiny(0, dtype=dtype)
        changed.load_state_dict({one: new.state_dict()[one]}, strict=False)
        assert generated(engine) == fresh(changed, new)


def test_weights_come_from_folders(tmp_path: Path) -> None:
    first, second, third = folders(tmp_path, 3)
    with opened(ContrastConfig(positive=str(first), negative=str(second))) as engine:
        before = generated(engine)
        engine.update("negative", third)
        with opened(ContrastConfig(positive=str(first), negative=str(third))) as other:
            assert generated(engine) == generated(other) != before
            engine.update("positive", load_file(third / "model.safetensors"))
            other.update("positive", third)
            assert generated(engine) == generated(other)


@pytest.mark.parametrize("optimizer", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_training_elsewhere_is_seen_by_the_next_request(optimizer: dict[str, bool]) -> None:
    """Also where, as with fused optimizers, weights change without a trace."""
    positive, negative = (tiny(seed, dtype=torch.float32) for seed in (0, 1))
    with engine_of(positive, negative) as engine:
        before = generated(engine)
        adam = torch.optim.AdamW(negative.parameters(), lr=0.05, **optimizer)
        text = torch.tensor([[5, 6, 7, 8]])
        losses = []
        for _ in range(3):
            loss = negative(input_ids=text, labels=text).loss
            loss.backward()
            adam.step()
            adam.zero_grad()
            with torch.no_grad():
                losses.append(float(negative(input_ids=text, labels=text).loss))
                plain = float(copy.deepcopy(negative)(input_ids=text, labels=text).loss)
            assert losses[-1] == pytest.approx(plain, rel=1e-6), "who else runs the model sees its weights as they are"
        assert losses[-1] < losses[0]
        assert generated(engine) == fresh(positive, negative) != before
        assert engine.score([[5, 6, 7, 8]])[0].log_probs["negative"] == pytest.approx(
            engine_of(positive, copy.deepcopy(negative)).score([[5, 6, 7, 8]])[0].log_probs["negative"], abs=1e-5
        )
        negative.lm_head.weight.data.mul_(-1)
        assert generated(engine) == fresh(positive, negative)


def test_a_closed_engine_leaves_the_model_as_it_was() -> None:
    model = tiny(0, dtype=torch.float32)
    attention, forwards = model.config._attn_implementation, [vars(module).keys() for module in model.modules()]
    with engine_of(model) as first, engine_of(model, tiny(1, dtype=torch.float32)) as second:
        want = generated(first)
        first.close()
        assert len(generated(second)) == len(PROMPTS)
    with engine_of(model) as again:
        assert generated(again) == want
    assert model.config._attn_implementation == attention
    assert [vars(module).keys() for module in model.modules()] == forwards


def test_weights_that_do_not_fit_change_nothing() -> None:
    models = [tiny(0), tiny(1)]
    with engine_of(*models) as engine:
        before = generated(engine)
        good = {name: value + 1 for name, value in models[1].state_dict().items()}
        with pytest.raises(UserError, match=r"negative model has no weight 'lm_hed.weight'; it has model"):
            engine.update("negative", good | {"lm_hed.weight": torch.zeros(2)})
        with pytest.raises(UserError, match=r"'lm_head.weight' of the negative model has shape \[258, 16\], not \[2\]"):
            engine.update("negative", good | {"lm_head.weight": torch.zeros(2)})
        with pytest.raises(UserError, match="has no base model; it has positive, negative"):
            engine.update("base", good)
        assert generated(engine) == before


def test_folders_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    first, second = folders(tmp_path)
    save(tiny(3, dtype=torch.float32, num_hidden_layers=1), tokenizer(), tmp_path / "small")
    (tmp_path / "empty").mkdir()
    with opened(ContrastConfig(positive=str(first), negative=str(second))) as engine:
        before = generated(engine)
        with pytest.raises(UserError, match=r"lacks weight 'model\.layers\.1"):
            engine.update("positive", tmp_path / "small")
        with pytest.raises(UserError, match="holds no tokenizer"):
            engine.update("positive", tmp_path / "empty")
        assert generated(engine) == before


def adapter_on(folder: Path, out: Path, seed: int = 0) -> Path:
    loaded = load(folder)
    model = add_adapter(loaded.model, AdapterConfig(r=2), seed=seed)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save(model, loaded.tokenizer, out, merge=False)
    save(model, loaded.tokenizer, out.with_name(out.name + "-merged"))
    return out


def test_an_adapter_shares_the_weights_of_the_positive_model(tmp_path: Path) -> None:
    (base,) = folders(tmp_path, 1)
    adapter, other = adapter_on(base, tmp_path / "adapter"), adapter_on(base, tmp_path / "other", seed=1)
    with opened(ContrastConfig(positive=str(base), negative=str(tmp_path / "adapter-merged"))) as engine:
        want = generated(engine)
    with opened(ContrastConfig(positive=str(base), negative=str(tmp_path / "other-merged"))) as engine:
        updated = generated(engine)
    with opened(ContrastConfig(positive=str(base), negative=str(adapter)), slots=3) as engine:
        assert engine.members[0].model is engine.members[1].model
        assert generated(engine) == want != updated
        with pytest.raises(UserError, match="has no weight 'lora'"):
            engine.update("negative", {"lora": torch.zeros(1)})
        with pytest.raises(UserError, match="shares its weights with the negative one"):
            engine.update("positive", base)
        assert generated(engine) == want
        engine.update("negative", other)
        assert generated(engine) == updated
        engine.update("negative", load_file(adapter / "adapter_model.safetensors"))
        assert generated(engine) == want


def test_other_adapters_are_merged(tmp_path: Path) -> None:
    base, other = folders(tmp_path)
    adapter = adapter_on(base, tmp_path / "adapter")
    for contrast in (
        {"positive": adapter},
        {"positive": adapter, "negative": base},
        {"positive": other, "negative": adapter},
    ):
        given = {role: str(path) for role, path in contrast.items()}
        whole = {role: str(path).replace(str(adapter), f"{adapter}-merged") for role, path in given.items()}
        with opened(ContrastConfig(**given)) as engine, opened(ContrastConfig(**whole)) as other_engine:
            assert not any(isinstance(member.model, PeftModel) for member in engine.members)
            assert generated(engine) == generated(other_engine)


def test_an_adapter_in_memory_on_the_positive_model_itself() -> None:
    base = tiny(0)
    plain = copy.deepcopy(base)
    adapted = add_adapter(base, AdapterConfig(r=2), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with engine_of(base, adapted) as engine:  # type: ignore[arg-type]
        assert generated(engine) == fresh(plain, merged(adapted)) != fresh(plain, plain)


def test_models_come_from_folders(tmp_path: Path) -> None:
    paths = folders(tmp_path)
    contrast = ContrastConfig(positive=str(paths[0]), negative=str(paths[1]))
    models = [load(path).model.double() for path in paths]
    with opened(contrast, slots=4) as engine:
        assert_as_slow(engine, models, PROMPTS, [SAMPLING] * len(PROMPTS))


def test_folders_without_weights_and_models_that_are_none(tmp_path: Path) -> None:
    (folder,) = folders(tmp_path, 1)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"negative model.*no \*\.safetensors"):
        opened(ContrastConfig(positive=str(folder), negative=str(bare)))
    with pytest.raises(UserError, match=r"the contrast's positive model: .* does not exist"):
        opened(ContrastConfig(positive=str(tmp_path / "m7")))


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=TOKENS, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="positive model is an encoder-decoder"):
        engine_of(T5ForConditionalGeneration(config))


def test_tokenizers_must_agree_but_for_added_tokens() -> None:
    longer, other = copy.deepcopy(tokenizer()), copy.deepcopy(tokenizer())
    longer.add_special_tokens({"pad_token": "<pad>"})
    models = [tiny(0, vocab_size=TOKENS + 1), tiny(1)]
    with torch.no_grad():
        models[0].lm_head.weight[TOKENS] = 50 * models[0].lm_head.weight[0]
    with engine_of(*models, tokenizers=[longer, tokenizer()]) as engine:
        assert_as_slow(engine, models, PROMPTS, mixed(6))
        (refused, sound) = engine.generate([[1, TOKENS], [1]], SAMPLING)
        assert refused.error == "request 0: the prompt holds token id 258; the models share the ids 0 to 257"
        assert sound.error is None
        assert "258" in str(engine.generate(["a<pad>"])[0].error)
    other.backend_tokenizer.add_special_tokens(["<other>"])
    vocabulary = other.get_vocab()
    assert vocabulary["<other>"] == TOKENS
    with pytest.raises(UserError, match=f"token {TOKENS} is '<pad>' for positive and '<other>' for negative"):
        engine_of(*[tiny(seed, vocab_size=TOKENS + 1) for seed in (0, 1)], tokenizers=[longer, other])


def test_models_must_be_those_of_the_contrast() -> None:
    with pytest.raises(UserError, match="has the models positive, negative; given are positive"):
        TransformersEngine(TransformersEngine.Config(), PAIR, {"positive": engine_of_one()})


def engine_of_one() -> Any:
    from isoray.models.load import LoadedModel

    return LoadedModel(tiny(0), tokenizer(), "causal")
