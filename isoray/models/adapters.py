"""LoRA adapters through peft."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from isoray.config.base import nearest
from isoray.errors import UserError
from isoray.models.config import AdapterConfig
from isoray.models.folders import quiet

ALL_LINEAR = "all-linear"


def add_adapter(model: PreTrainedModel, config: AdapterConfig, *, seed: int) -> PeftModel:
    """``model`` with a new LoRA adapter, its only trainable part; computes what ``model`` did until it is trained.

    The adapter's weights are float32 whatever the model's dtype. Raises UserError, with the nearest names, if a target
    matches no module.
    """
    targets: str | list[str] = list(config.targets)
    if config.targets == (ALL_LINEAR,):
        targets = ALL_LINEAR
    else:
        _check_targets(model, config.targets)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it by r, whole or not
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, lora)
    assert isinstance(adapted, PeftModel)
    return adapted


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name and tensor of every parameter that is trained; a tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merged(model: nn.Module) -> PreTrainedModel:
    """A copy of ``model`` with its adapter added into the weights; ``model`` itself stays as it is."""
    assert isinstance(model, PeftModel)
    whole: Any = copy.deepcopy(model)
    result = whole.merge_and_unload()
    assert isinstance(result, PreTrainedModel)
    return result


def _check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    paths = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    for target in targets:
        if not any(path == target or path.endswith("." + target) for path in paths):
            hint = nearest(target, {path.rpartition(".")[2] for path in paths})
            raise UserError(f"model.adapter.targets: no module is called {target!r}; {hint} (or {ALL_LINEAR})")
