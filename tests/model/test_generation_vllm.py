"""What only vLLM has, or has otherwise, on small random models: numbers that break down, sizes that differ, folders."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_models import small_model, small_tokenizer
from transformers import PreTrainedTokenizerFast

from isoray.errors import UserError
from isoray.generation.contrast import ContrastConfig
from isoray.generation.folder import make_contrast_folder
from isoray.generation.sampling import SamplingConfig
from isoray.generation.transformers import TransformersEngine
from isoray.models.adapters import add_adapter
from isoray.models.config import AdapterConfig, TokenizerConfig
from isoray.models.load import load, save
from isoray.models.tokenizer import train_tokenizer

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

GREEDY = SamplingConfig(temperature=0, max_tokens=10, eos="ignore")
PROMPTS = ["one two", "three four five six", "seven"]
Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer()


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Makes a folder with a small random model."""

    def made(seed: int, **settings: Any) -> Path:
        return small_model(tmp_path_factory.mktemp("tiny") / "model", seed, **settings)

    return made


@pytest.fixture
def vllm_engine() -> Callable[[ContrastConfig], object]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: make install (for CPUs), or pip install 'isoray[vllm]'")
    from isoray.generation.vllm import VllmEngine

    return lambda contrast: VllmEngine(VllmEngine.Config(slots=4), contrast)


def test_a_request_whose_numbers_break_down_fails_alone(make: Maker, vllm_engine, tokenizer) -> None:
    (broken,) = tokenizer(" eight").input_ids[:1]
    contrast = ContrastConfig(positive=str(make(0)), negative=str(make(1, broken=broken)))
    with vllm_engine(contrast) as engine:
        good = engine.generate(PROMPTS, GREEDY)
        mixed = engine.generate([PROMPTS[0], "one eight", *PROMPTS[1:]], GREEDY)
        assert [one.token_ids for one in mixed[:1] + mixed[2:]] == [one.token_ids for one in good]
        assert mixed[1].finish == "error" and mixed[1].text == ""
        assert mixed[1].error.startswith("request 1: the negative model gave logits that are not numbers")
        assert [one.token_ids for one in engine.generate(PROMPTS, GREEDY)] == [one.token_ids for one in good]
        sound, unsound = engine.score(["one two", "one eight two"])
        assert sound.error is None and unsound.error.startswith("text 1: the negative model gave logits")
        assert [one.token_ids for one in engine.generate(PROMPTS, GREEDY)] == [one.token_ids for one in good]


def test_models_of_other_depth_and_padding(make: Maker, vllm_engine) -> None:
    contrast = ContrastConfig(positive=str(make(0)), negative=str(make(1, layers=1, vocabulary=576)))
    with TransformersEngine(TransformersEngine.Config(), contrast) as engine:
        expected = engine.generate(PROMPTS, GREEDY)
    with vllm_engine(contrast) as engine:
        assert [one.token_ids for one in engine.generate(PROMPTS, GREEDY)] == [one.token_ids for one in expected]


def test_a_folder_names_its_models_and_copies_no_weights(make: Maker, tmp_path: Path) -> None:
    positive, negative = make(0), make(1)
    contrast = ContrastConfig(positive=str(positive), negative=str(negative), gamma=float("inf"))
    folder = make_contrast_folder(contrast, tmp_path / "contrast")
    assert not list(folder.rglob("*.safetensors"))
    spec = json.loads((folder / "config.json").read_text())["isoray_contrast"]
    assert spec["models"] == {"positive": str(positive), "negative": str(negative)} and float(spec["gamma"]) > 1e9
    before = (folder / "config.json").stat().st_mtime_ns
    assert make_contrast_folder(contrast, folder) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before
    make_contrast_folder(contrast.model_copy(update={"alpha": 0.5}), folder)
    assert json.loads((folder / "config.json").read_text())["isoray_contrast"]["alpha"] == 0.5


def test_an_adapter_is_merged_into_the_folder(make: Maker, tmp_path: Path, tokenizer) -> None:
    positive = make(0)
    adapted = add_adapter(load(positive).model, AdapterConfig(), seed=0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    save(adapted, tokenizer, tmp_path / "adapter", merge=False)
    contrast = ContrastConfig(positive=str(positive), negative=str(tmp_path / "adapter"))
    folder = make_contrast_folder(contrast, tmp_path / "contrast")
    merged = folder / "negative"
    spec = json.loads((folder / "config.json").read_text())["isoray_contrast"]
    assert spec["models"]["negative"] == str(merged) and (merged / "model.safetensors").is_file()
    with TransformersEngine(TransformersEngine.Config(), contrast) as engine:
        shared = engine.generate(PROMPTS, GREEDY)
    whole = contrast.model_copy(update={"negative": str(merged)})
    with TransformersEngine(TransformersEngine.Config(), whole) as engine:
        assert [one.token_ids for one in engine.generate(PROMPTS, GREEDY)] == [one.token_ids for one in shared]


def test_bad_folders_are_refused_and_nothing_is_left(make: Maker, tmp_path: Path) -> None:
    positive, empty = make(0), make(1)
    (empty / "model.safetensors").unlink()
    out = tmp_path / "contrast"
    with pytest.raises(UserError, match=r"the contrast's negative model: .* no \*.safetensors"):
        make_contrast_folder(ContrastConfig(positive=str(positive), negative=str(empty)), out)
    other = make(2)
    texts = ["quite other words to learn from, so the merges differ"] * 3
    train_tokenizer(texts, TokenizerConfig(vocab_size=512)).save_pretrained(other)
    with pytest.raises(UserError, match=r"token \d+ is .* for positive and .* for negative"):
        make_contrast_folder(ContrastConfig(positive=str(positive), negative=str(other)), out)
    with pytest.raises(UserError, match="holds a model"):
        make_contrast_folder(ContrastConfig(positive=str(positive), negative=str(make(3))), positive)
    with pytest.raises(UserError, match="positive model: vLLM takes local Transformers folders, not gpt2"):
        make_contrast_folder(ContrastConfig(positive="gpt2"), out)
    assert not out.exists()


def test_beams_are_refused(make: Maker, vllm_engine) -> None:
    with vllm_engine(ContrastConfig(positive=str(make(0)))) as engine:
        refused, good = engine.generate(PROMPTS[:2], [SamplingConfig(beams=2), GREEDY])
        assert "request 0: the vLLM engine has no beams" in refused.error
        assert len(good.token_ids) == 10
