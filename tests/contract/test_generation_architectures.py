"""Architectures with other positions, windows and layers are served as they compute alone, or refused."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from generating import CONTEXT, assert_as_slow, engine_of, mixed, some_prompts, tiny

from isoray.errors import UserError
from isoray.generation.sampling import SamplingConfig

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
GROUPED = LAYERS | {"num_key_value_heads": 2, "head_dim": 4}
WINDOW = 6

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 2},  # learned positions, Conv1D, tied head
    "gpt_neox": LAYERS,
    "qwen2": LAYERS | {"num_key_value_heads": 2},  # biases
    "opt": {"num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "mistral": GROUPED | {"sliding_window": WINDOW},  # every layer looks at a window
    "gemma2": GROUPED | {"sliding_window": WINDOW},  # every other layer does; soft caps
    "bloom": {"n_layer": 2, "n_head": 4},  # ALiBi
}
OWN_MASKS = ("mistral", "gemma2", "bloom")


pytestmark = pytest.mark.usefixtures("one_thread")


def pair(kind: str) -> list[Any]:
    # The masks of eager attention, which Bloom has, break in float64.
    dtype = torch.float32 if kind == "bloom" else torch.float64
    return [tiny(seed, kind, dtype, **ARCHITECTURES[kind]) for seed in (0, 1)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_texts_are_those_of_the_slow_way(kind: str) -> None:
    models, prompts = pair(kind), some_prompts(8)
    with engine_of(*models, slots=4, context=CONTEXT) as engine:
        assert_as_slow(engine, models, prompts, mixed(8))


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in OWN_MASKS])
def test_texts_with_fixed_shapes(kind: str) -> None:
    models, prompts = pair(kind), some_prompts(6, seed=1)
    with engine_of(*models, slots=3, context=CONTEXT, static_cache=True) as engine:
        assert_as_slow(engine, models, prompts, mixed(6, seed=1))


@pytest.mark.parametrize("static", [False, True])
def test_eager_attention(static: bool) -> None:
    models = [tiny(seed, dtype=torch.float32, attn_implementation="eager") for seed in (0, 1)]
    assert models[0].config._attn_implementation == "eager"
    with engine_of(*models, slots=3, static_cache=static) as engine:
        assert_as_slow(engine, models, some_prompts(6), mixed(6))


@pytest.mark.parametrize("kind", OWN_MASKS)
def test_masks_of_their_own_need_a_growing_cache(kind: str) -> None:
    with pytest.raises(UserError, match=f"positive model \\({kind}\\) has attention windows or ALiBi"):
        engine_of(*pair(kind), context=CONTEXT, static_cache=True)
    if kind != "bloom":
        with engine_of(*pair(kind), context=WINDOW, static_cache=True) as engine:
            assert_as_slow(engine, pair(kind), [[1, 2]], [SamplingConfig(max_tokens=3)])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mamba", {"num_hidden_layers": 2, "state_size": 4}),
        ("lfm2", LAYERS | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
        ("openai-gpt", {"n_layer": 2, "n_head": 2}),
    ],
)
def test_models_that_keep_no_keys_and_values_are_refused(kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"positive model \\({kind}\\) keeps something else"):
        engine_of(tiny(0, kind, torch.float32, **settings))


def test_a_model_that_does_not_tell_its_context() -> None:
    model = tiny(0, "bloom", torch.float32, max_position_embeddings=None, **ARCHITECTURES["bloom"])
    with pytest.raises(UserError, match="set the engine's `context`"):
        engine_of(model)


def test_a_model_that_ignores_the_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(0)
    forward = model.model.forward

    def careless(*args: object, attention_mask: object = None, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", careless)
    with pytest.raises(UserError, match="computes other things for a batch of texts than for each alone"):
        engine_of(model)


def test_a_model_under_training_drops_nothing_while_it_generates() -> None:
    dropping = tiny(0, "gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    dropping.train()
    dropping.transformer.h[1].eval()
    with engine_of(dropping, context=CONTEXT) as engine:
        assert dropping.training
        answers = engine.generate(some_prompts(4), SamplingConfig(max_tokens=10))
        scores = engine.score(some_prompts(4))
    assert dropping.training and dropping.transformer.h[0].training and not dropping.transformer.h[1].training
    with engine_of(dropping.eval(), context=CONTEXT) as engine:
        again = engine.generate(some_prompts(4), SamplingConfig(max_tokens=10))
        assert [one.token_ids for one in answers] == [one.token_ids for one in again]
        assert scores == engine.score(some_prompts(4))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_models_draw_the_same_and_are_compiled_once() -> None:
    import torch._dynamo

    models = [tiny(seed, num_hidden_layers=1) for seed in (0, 1)]
    prompts = some_prompts(7, longest=20)
    torch._dynamo.reset()
    settings = {"slots": 3, "static_cache": True, "compile": True}
    with torch._dynamo.config.patch(error_on_recompile=True), engine_of(*models, **settings) as engine:
        assert_as_slow(engine, models, prompts, mixed(7))
        engine.update("negative", {"lm_head.weight": -models[1].state_dict()["lm_head.weight"]})
        assert_as_slow(engine, models, prompts, mixed(7), seed=4)
