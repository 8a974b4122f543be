"""Loads the weights of a contrast's models in vLLM, each from its own folder."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


class ContrastLoader(DefaultModelLoader):
    """vLLM's default loader, once for every model of the contrast."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="auto"))

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to do: a contrast names local folders."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill every model of the contrast. ValueError, from vLLM, if a folder lacks some of its weights."""
        parts: Any = model
        for role, part in parts.parts.items():
            super().load_weights(part, config_for(model_config, parts.folders[role]))


def config_for(model_config: ModelConfig, folder: str) -> ModelConfig:
    """``model_config`` of the contrast, pointing to the folder of one of its models."""
    own = copy.copy(model_config)
    own.model, own.model_weights, own.revision = folder, "", None
    return own


@torch.inference_mode()
def reload_weights(part: nn.Module, model_config: ModelConfig, load_config: LoadConfig, folder: Path) -> None:
    """Replace the weights of one model of a contrast, in place, by those in ``folder`` (all, or some of them)."""
    loader = ContrastLoader(load_config)
    own = config_for(model_config, str(folder))
    # vLLM keeps weights in its kernels' layout; this takes them back to the files' layout and forth again.
    initialize_layerwise_reload(part)
    weights: Iterator[tuple[str, Tensor]] = loader.get_all_weights(own, part)
    part.load_weights(weights)  # type: ignore[operator]
    finalize_layerwise_reload(part, own)  # type: ignore[no-untyped-call]
