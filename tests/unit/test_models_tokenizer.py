"""Byte-level BPE: exact round trips, the same tokenizer from the same texts, a padding token for all."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from isoray.errors import DataError, UserError
from isoray.models.config import TokenizerConfig
from isoray.models.tokenizer import load_tokenizer, train_tokenizer, with_pad_token

TEXTS = [f"The {a} {b}s the {c}, and Mr. {a.title()} doesn't.\n" for a in ("cat", "dog", "naïve 猫") for b in
         ("see", "hear", "chase") for c in ("house", "mouse", "Straße")] * 3  # fmt: skip
CONFIG = TokenizerConfig(vocab_size=512)


def nasty_texts() -> list[str]:
    fixed = [
        "",
        " ",
        "  two  spaces . , ' n't",
        "\r\n\t\0\x7f",
        "🏳️‍🌈 e\u0301 \u200d\ufeff",
        "naïve <|eos|> text",
        "\ue000\U0010fffd",
    ]
    rng = random.Random(0)
    usable = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    return fixed + ["".join(chr(rng.choice(usable)) for _ in range(rng.randrange(1, 200))) for _ in range(50)]


def test_any_text_decodes_to_itself(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, CONFIG)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    reloaded = load_tokenizer(tmp_path)
    for text in nasty_texts() + TEXTS:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert reloaded(text).input_ids == ids
        assert reloaded.decode(ids) == text
    assert len(reloaded) == len(tokenizer) <= 512


def test_special_tokens_and_length() -> None:
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=512, special_tokens=("<|user|>",)), context=77)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer("a<|user|>b").input_ids[1] == 3
    assert tokenizer.model_max_length == 77
    assert len(tokenizer("the cat").input_ids) < len(b"the cat"), "nothing was merged"


def test_same_texts_same_tokenizer_whatever_order_and_threads() -> None:
    reference = train_tokenizer(TEXTS, CONFIG).backend_tokenizer.to_str()
    assert train_tokenizer(TEXTS[::-1], CONFIG).backend_tokenizer.to_str() == reference
    code = (
        "import sys, json\n"
        "from isoray.models.config import TokenizerConfig\n"
        "from isoray.models.tokenizer import train_tokenizer\n"
        "texts = json.load(sys.stdin)\n"
        "sys.stdout.write(train_tokenizer(texts, TokenizerConfig(vocab_size=512)).backend_tokenizer.to_str())"
    )
    single = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(TEXTS).encode(),
        env=os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "5"},
        capture_output=True,
        check=True,
    )
    assert single.stdout.decode() == reference


def test_no_text_no_tokenizer() -> None:
    with pytest.raises(DataError, match="corpora are empty"):
        train_tokenizer(["", ""], CONFIG)


def test_padding_falls_back_to_the_end_of_text_token() -> None:
    backend = Tokenizer(models.WordLevel({"<e>": 0, "a": 1}, unk_token="<e>"))
    tokenizer = with_pad_token(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>"))
    assert tokenizer.pad_token_id == 0
    assert len(tokenizer) == 2, "the vocabulary must not grow"
    with pytest.raises(UserError, match="neither"):
        with_pad_token(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_folder_without_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
