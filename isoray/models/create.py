"""Models from scratch: a Transformers config in a size of one's own, weights drawn from a seed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from isoray.config.base import nearest
from isoray.errors import UserError
from isoray.models.config import CreateConfig
from isoray.models.folders import quiet
from isoray.models.tokenizer import first_line

_FEED_FORWARD = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim")
_OURS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "max_position_embeddings": "context",
    "vocab_size": "tokenizer.vocab_size",
}
"""Transformers' names of what has a field of its own here."""


def transformers_config(create: CreateConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> PreTrainedConfig:
    """The Transformers config of ``create``, with the sizes and special tokens of ``tokenizer``.

    Raises UserError for an unknown architecture, for keys of ``extra`` that the architecture does not have, and for
    values that Transformers refuses.
    """
    known = _config_class(create.architecture)
    keys = _keys(known)
    sizes = {key: value for key, value in _sizes(create, known).items() if key in keys and value is not None}
    _check_extra(create, known, keys)
    tokens: dict[str, Any] = {}
    if tokenizer is not None:
        tokens = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    try:
        config: PreTrainedConfig = known(**{**sizes, **tokens, **create.extra})
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model.create: Transformers refuses this {create.architecture}: {reason}") from error
    if config.tie_word_embeddings != create.tie_embeddings:
        raise UserError(
            f"model.create.tie_embeddings: Transformers has {create.architecture} with tied embeddings only."
        )
    if config.is_encoder_decoder and tokenizer is not None and "decoder_start_token_id" not in create.extra:
        config.decoder_start_token_id = tokenizer.pad_token_id
    return config


def new_model(config: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
    """A float32 model with weights drawn from ``seed``; the caller's random state stays as it was."""
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        try:
            model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"model.create: this {config.model_type} cannot be built: {first_line(error)}") from error
    return model


def _config_class(architecture: str) -> type[PreTrainedConfig]:
    configs: dict[str, type[PreTrainedConfig]] = CONFIG_MAPPING
    if architecture in configs:
        found = configs[architecture]
        if found in MODEL_FOR_CAUSAL_LM_MAPPING or found in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            return found
        raise UserError(f"model.create.architecture: {architecture!r} is no language model of Transformers.")
    raise UserError(
        f"model.create.architecture: Transformers knows no {architecture!r}; {nearest(architecture, list(configs))}"
    )


def _keys(known: type[PreTrainedConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(known)} | set(known.attribute_map)


def _sizes(create: CreateConfig, known: type[PreTrainedConfig]) -> dict[str, Any]:
    names = known.attribute_map
    width = create.intermediate_size or 4 * create.hidden_size
    common = {
        "hidden_size": create.hidden_size,
        "num_hidden_layers": create.layers,
        "num_attention_heads": create.heads,
        "num_key_value_heads": create.kv_heads or create.heads,
        "max_position_embeddings": create.context,
        "tie_word_embeddings": create.tie_embeddings,
        # where the default would be a size that belongs to another hidden_size
        "word_embed_proj_dim": create.hidden_size,
        "head_dim": create.hidden_size // create.heads,
        "decoder_layers": create.layers,
        "decoder_attention_heads": create.heads,
        **dict.fromkeys(_FEED_FORWARD, width),
    }
    return {names.get(key, key): value for key, value in common.items()}


def _check_extra(create: CreateConfig, known: type[PreTrainedConfig], keys: set[str]) -> None:
    ours = _OURS | {known.attribute_map.get(key, key): field for key, field in _OURS.items()}
    for key in create.extra:
        if key in ours:
            raise UserError(f"model.create.extra.{key}: set model.create.{ours[key]} instead.")
        if key not in keys:
            raise UserError(
                f"model.create.extra.{key}: a {create.architecture} config has no such key; {nearest(key, keys)}"
            )
