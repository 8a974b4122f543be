"""Prepare, load and save: the same model comes back, folders are whole, mistakes are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from isoray.errors import DataError, UserError
from isoray.models.config import AdapterConfig, CreateConfig, LoadOptions, ModelConfig, TokenizerConfig
from isoray.models.folders import parameter_count, whole_folder
from isoray.models.load import LoadedModel, load, prepare, save, weights_digest

TEXTS = ["the cat sees the dog and the dog sees the cat\n"] * 4
SMALL: dict[str, Any] = {"hidden_size": 32, "layers": 2, "context": 64, "tokenizer": TokenizerConfig(vocab_size=512)}


def small(architecture: str = "llama", **more: Any) -> ModelConfig:
    return ModelConfig(create=CreateConfig(architecture=architecture, **{**SMALL, **more}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(small(), tmp_path_factory.mktemp("models") / "llama", TEXTS, seed=0)


def logits(loaded: LoadedModel) -> torch.Tensor:
    ids = loaded.tokenizer("the cat sees", return_tensors="pt").input_ids
    extra = {"decoder_input_ids": ids} if loaded.layout == "seq2seq" else {}
    with torch.no_grad():
        return loaded.model(input_ids=ids, **extra).logits


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [("llama", "causal"), ("gpt2", "causal"), ("opt", "causal"), ("t5", "seq2seq"), ("bart", "seq2seq")],
)
def test_create_load_save_load(architecture: str, layout: str, tmp_path: Path) -> None:
    folder = prepare(small(architecture), tmp_path / "made", TEXTS, seed=3)
    first = load(folder)
    assert first.layout == layout
    assert not first.model.training
    assert first.model.config.vocab_size == len(first.tokenizer)
    save(first.model, first.tokenizer, tmp_path / "saved")
    second = load(tmp_path / "saved")
    assert torch.equal(logits(first), logits(second))
    assert second.tokenizer.backend_tokenizer.to_str() == first.tokenizer.backend_tokenizer.to_str()
    assert second.tokenizer.special_tokens_map == first.tokenizer.special_tokens_map
    assert weights_digest(tmp_path / "saved") == weights_digest(folder)


def test_parameters_are_counted_from_the_files_alone(folder: Path) -> None:
    assert parameter_count(folder) == sum(parameter.numel() for parameter in load(folder).model.parameters())


def test_preparing_again_does_nothing(tmp_path: Path) -> None:
    def no_texts() -> Iterator[str]:
        raise AssertionError("the texts were read again")
        yield

    folder = prepare(small(), tmp_path / "m", TEXTS, seed=0)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(small(), tmp_path / "m", no_texts(), seed=0) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    digest = weights_digest(folder)
    assert weights_digest(prepare(small(), tmp_path / "m", TEXTS, seed=1)) != digest
    assert weights_digest(prepare(small(), tmp_path / "again", TEXTS, seed=0)) == digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "m"], "temporary folders were left"


def test_an_existing_folder_is_used_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert prepare(ModelConfig(path=str(folder)), tmp_path / "unused", None, seed=0) == folder
    assert not (tmp_path / "unused").exists()


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds something else"):
        prepare(small(), tmp_path / "m", TEXTS, seed=0)
    assert (tmp_path / "m" / "thesis.tex").exists()


def test_a_tokenizer_may_come_from_another_model(folder: Path, tmp_path: Path) -> None:
    made = load(prepare(small(tokenizer=str(folder)), tmp_path / "m", None, seed=0))
    assert made.tokenizer.backend_tokenizer.to_str() == load(folder).tokenizer.backend_tokenizer.to_str()
    with pytest.raises(UserError, match="there are no texts"):
        prepare(small(), tmp_path / "n", None, seed=0)


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "old").touch()

    def fail_half_way() -> None:
        with whole_folder(tmp_path / "m") as temporary:
            (temporary / "new").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert [path.name for path in tmp_path.rglob("*")] == ["m", "old"]
    with whole_folder(tmp_path / "m") as temporary:
        (temporary / "new").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["m", "new"]


def test_missing_weights_are_an_error_not_a_random_layer(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    save(loaded.model, loaded.tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj"):
        load(tmp_path)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no \*\.safetensors"):
        weights_digest(tmp_path)


def test_options_of_loading(folder: Path, tmp_path: Path) -> None:
    half = load(folder, LoadOptions(dtype="bf16", attention="eager"))
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half.model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"is a causal model \(llama\), not seq2seq"):
        load(folder, LoadOptions(layout="seq2seq"))
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder, LoadOptions(attention="flash_attention_99"))
    gpt2 = load(prepare(small("gpt2"), tmp_path / "gpt2", TEXTS, seed=0), LoadOptions(dropout=0.25))
    dropouts = [module.p for module in gpt2.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts and set(dropouts) == {0.25}


def test_a_decoder_alone_of_an_encoder_decoder(tmp_path: Path) -> None:
    folder = prepare(small("t5"), tmp_path / "t5", TEXTS, seed=0)
    with pytest.raises(UserError, match=r"is a seq2seq model \(t5\), not causal"):
        load(folder, LoadOptions(layout="causal"))


def test_loading_is_silent(folder: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    load(folder, LoadOptions(adapter=AdapterConfig()))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_saved_folders_are_plain_transformers_folders(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = load(folder)
    save(loaded.model, loaded.tokenizer, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = tokenizer("the cat sees", return_tensors="pt").input_ids
    assert torch.equal(model(input_ids=ids).logits, logits(loaded))
    assert "dtype" in json.loads((tmp_path / "m" / "config.json").read_text())
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "m").iterdir()), "others cannot read it"
