"""A tokenizer that anyone can follow by eye: one token per byte, and <s>, </s>."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

BOS, EOS = 256, 257


def save_byte_tokenizer(folder: Path, *, adds_bos: bool = False, adds_eos: bool = False, has_eos: bool = True) -> Path:
    """Token ids 0-255 stand for byte values, 256 for <s>, 257 for </s>. Returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = _byte_characters()
    fast = tokenizers.Tokenizer(
        models.BPE(vocab={character: byte for byte, character in enumerate(alphabet)}, merges=[])
    )
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>"])
    assert fast.token_to_id("</s>") == EOS
    if adds_bos or adds_eos:
        template = ("<s> " if adds_bos else "") + "$A" + (" </s>" if adds_eos else "")
        fast.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    fast.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if has_eos:
        config["eos_token"] = {"content": "</s>", "__type": "AddedToken"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _byte_characters() -> list[str]:
    """The character that byte-level BPE shows for each byte value: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
