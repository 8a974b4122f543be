"""GGUF files: dequantise once into a Transformers folder."""

from __future__ import annotations

import contextlib
import copy
import io
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from isoray.errors import UserError
from isoray.models.folders import quiet
from isoray.models.tokenizer import first_line, with_pad_token


def read_gguf(path: Path) -> tuple[PreTrainedModel, Any]:
    """The model (float32, dequantised, free of its quantisation marks) and the tokenizer of a GGUF file.

    Raises UserError if Transformers does not know the file's architecture or the file is broken.
    """
    # Transformers counts the tensors on a progress bar of its own that has no switch.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            loaded = auto.from_pretrained(
                path.parent, config=config, gguf_file=path.name, local_files_only=True, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        except ImportError as error:
            raise UserError(f"Reading {path.name} needs more packages: {first_line(error)}") from error
        except (ValueError, KeyError, IndexError, OSError, NotImplementedError, struct.error) as error:
            raise UserError(f"{path} cannot be read as a GGUF model: {first_line(error)}") from error
        return _unmarked(loaded, auto), with_pad_token(tokenizer)


def _unmarked(loaded: PreTrainedModel, auto: Any) -> PreTrainedModel:
    """The same weights in a model that Transformers agrees to save: one loaded from GGUF counts as quantised."""
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model
