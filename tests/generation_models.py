"""Small random language models in folders, for tests of generation."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from isoray.models.config import TokenizerConfig
from isoray.models.load import save
from isoray.models.tokenizer import train_tokenizer

WORDS = "one two three four five six seven eight nine ten"


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with 512 tokens at most; <|bos|> is 0, <|eos|> 1."""
    return train_tokenizer([WORDS] * 3, TokenizerConfig(vocab_size=512))


def small_model(
    folder: Path, seed: int, *, layers: int = 2, vocabulary: int = 512, context: int = 128, broken: int | None = None
) -> Path:
    """A folder with a random Llama that vLLM can run, too; ``broken``: the input embedding of this token is NaN."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    if broken is not None:
        with torch.no_grad():
            model.get_input_embeddings().weight[broken] = torch.nan
    save(model, small_tokenizer(), folder)
    return folder
