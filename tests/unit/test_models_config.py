"""What a model's configuration accepts, and what it says when it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from isoray.errors import InfraError, UserError
from isoray.models.config import CreateConfig, ModelConfig
from isoray.models.create import new_model, transformers_config
from isoray.models.load import check
from isoray.models.locate import fetch, locate


@pytest.mark.parametrize("given", [{}, {"path": "x", "create": {}}])
def test_exactly_one_of_path_and_create(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="exactly one of"):
        ModelConfig.model_validate(given)


@pytest.mark.parametrize("given", [{"heads": 3}, {"kv_heads": 3}, {"widht": 3}])
def test_sizes_that_do_not_fit(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CreateConfig.model_validate(given)


def test_a_missing_path_names_its_nearest_sibling(tmp_path: Path) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    with pytest.raises(UserError, match=r"does not exist; .*did you mean 'smollm2-135m'"):
        check(ModelConfig(path=str(tmp_path / "smollm2-135")))


def test_a_mistyped_relative_path_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny-llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="tiny-llama"):
        locate("models/tiny-lama")
    with pytest.raises(UserError, match="tiny-llama"):
        locate("models/tiny-lama.gguf")
    assert locate("someone/tiny-llama").kind == "hub"
    assert locate("gpt2").kind == "hub"


def test_what_a_folder_holds_decides(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a Transformers model .* nor a \.gguf"):
        locate(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    assert locate(str(tmp_path)).path == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match=r"2 \.gguf files; name one: a\.gguf, b\.gguf"):
        locate(str(tmp_path))
    assert locate(str(tmp_path / "b.gguf")).kind == "gguf"
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match="Pickled weights are not read"):
        locate(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert locate(str(tmp_path)).kind == "transformers"


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InfraError, match="give its folder"):
        fetch("someone/some-model")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox", "qwen2", "t5", "bart"])
def test_architectures_take_our_sizes(architecture: str) -> None:
    create = CreateConfig(
        architecture=architecture, hidden_size=32, layers=3, heads=4, intermediate_size=40, context=16
    )
    config = transformers_config(create)
    config.vocab_size = 64
    model = new_model(config, seed=0)
    widths = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    assert (64, 32) in widths, "vocabulary x hidden_size"
    assert any(40 in shape for shape in widths), "intermediate_size"
    assert max(int(part) for name, _ in model.named_parameters() for part in name.split(".") if part.isdigit()) == 2
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_extra_keys_are_checked_against_the_architecture() -> None:
    config = transformers_config(CreateConfig(architecture="gpt2", extra={"resid_pdrop": 0.25}))
    assert config.resid_pdrop == 0.25
    with pytest.raises(
        UserError, match=r"extra\.resid_drop: a gpt2 config has no such key; did you mean 'resid_pdrop'"
    ):
        check(ModelConfig(create=CreateConfig(architecture="gpt2", extra={"resid_drop": 0.25})))
    with pytest.raises(UserError, match=r"set model\.create\.layers instead"):
        check(ModelConfig(create=CreateConfig(extra={"num_hidden_layers": 2})))
    with pytest.raises(UserError, match=r"set model\.create\.layers instead"):
        check(ModelConfig(create=CreateConfig(architecture="gpt2", extra={"n_layer": 2})))
    with pytest.raises(UserError, match="Transformers refuses"):
        check(ModelConfig(create=CreateConfig(extra={"rms_norm_eps": "small"})))


def test_embeddings_are_tied_or_not_as_asked_or_refused() -> None:
    untied = transformers_config(CreateConfig(architecture="gpt2", hidden_size=32, tie_embeddings=False))
    untied.vocab_size = 64
    model = new_model(untied, seed=0)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    with pytest.raises(UserError, match="tied embeddings only"):
        transformers_config(CreateConfig(architecture="t5", tie_embeddings=False))


def test_unknown_architectures_name_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean .*'llama'"):
        check(ModelConfig(create=CreateConfig(architecture="lama")))
    with pytest.raises(UserError, match="no language model"):
        check(ModelConfig(create=CreateConfig(architecture="vit")))


def test_weights_hang_on_the_seed_alone() -> None:
    import torch

    config = transformers_config(CreateConfig(hidden_size=32, layers=1))
    config.vocab_size = 64
    state = torch.get_rng_state()
    one, same, other = (new_model(config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
