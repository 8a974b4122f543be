"""Tiny models for tests."""

from __future__ import annotations

from typing import TypeVar

import torch
from transformers import GPTNeoXForCausalLM, LlamaForCausalLM, PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)


def make_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A 2-layer Llama with 97 tokens; the same weights for the same seed."""
    return _make(LlamaForCausalLM, seed, dtype)


def make_neox(seed: int = 0) -> GPTNeoXForCausalLM:
    """A 2-layer GPT-NeoX in float64: unlike Llama's, all its arithmetic is, its norms included."""
    return _make(GPTNeoXForCausalLM, seed, torch.float64)


def _make(kind: type[Model], seed: int, dtype: torch.dtype) -> Model:
    torch.manual_seed(seed)
    config = kind.config_class(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return kind(config).to(dtype)
