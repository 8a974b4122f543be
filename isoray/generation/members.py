"""The models of a contrast as the Transformers engine runs them: each with its own cache, side by side on one device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import Cache, DynamicCache

from isoray.errors import UserError
from isoray.generation.contrast import ContrastConfig, Role
from isoray.generation.decoding import GROUPED, pack, unpack
from isoray.models.adapters import merged
from isoray.models.config import LoadOptions
from isoray.models.load import LoadedModel, base_of, load
from isoray.models.structure import plain


@dataclass
class Member:
    """One model of a contrast, in evaluation mode."""

    role: Role
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerFast
    adapter: bool | None = None
    """Of a model that two members share: whether this one is the model with its adapter, or without; None: not shared."""
    compiled: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        inner = plain(self.model)
        if inner.config.is_encoder_decoder:
            raise UserError(f"The {self.role} model is an encoder-decoder; a contrast takes decoder-only models.")
        self._last_only = "logits_to_keep" in inspect.signature(inner.forward).parameters

    @property
    def vocabulary(self) -> int:
        """Size of the output layer, padding included."""
        head: Any = plain(self.model).get_output_embeddings()
        return int(head.weight.shape[0])

    @property
    def context(self) -> int | None:
        """The longest sequence that the model was made for, if its config tells."""
        length = getattr(plain(self.model).config, "max_position_embeddings", None)
        return length if isinstance(length, int) and length > 0 else None

    def check_fixed_shapes(self) -> None:
        """Raise UserError for a model whose attention depends on more than what is masked: windows, ALiBi."""
        config: Any = plain(self.model).config
        windows = any("sliding" in kind or "chunked" in kind for kind in getattr(config, "layer_types", None) or ())
        if windows or getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
            raise UserError(
                f"The {self.role} model ({config.model_type}) has attention windows or ALiBi, which `static_cache` "
                "cannot serve; leave it out."
            )

    def forward(self, ids_BT: Tensor, positions_BT: Tensor, mask_BC: Tensor | None, cache: Cache | None) -> Tensor:
        """Logits [B, V] after the last of T tokens, in the model's dtype; keys and values go into ``cache``."""
        logits_BTV = self._run(
            self.compiled if self.compiled is not None and ids_BT.shape[1] == 1 else self.model,
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=mask_BC,
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": 1} if self._last_only else {}),
        )
        return logits_BTV[:, -1]

    def log_probs(self, ids_BT: Tensor, mask_BT: Tensor, vocabulary: int) -> Tensor:
        """Log-probability [B, T - 1] of each token but the first (float32), for texts padded on the right."""
        logits_BTV = self._run(self.model, input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        rows = []
        for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True):  # row by row: log-softmax takes twice the memory
            log_probs_TV = torch.log_softmax(logits_TV[:-1, :vocabulary].float(), dim=-1)
            rows.append(log_probs_TV.gather(1, ids_T[1:, None]).squeeze(1))
        return torch.stack(rows)

    def _run(self, model: Callable[..., Any], **inputs: Any) -> Tensor:
        shared_without = self.adapter is False
        with cast(PeftModel, self.model).disable_adapter() if shared_without else nullcontext():
            return cast(Tensor, model(**inputs).logits)

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrite the weights that are named, in place. UserError for a name or shape that the model has not.

        Of a shared adapter, in the names of its own files.
        """
        if self.adapter:
            set_peft_model_state_dict(self.model, dict(weights))
            return
        own = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        for name, value in weights.items():
            if name not in own:
                raise UserError(f"The {self.role} model has no weight {name!r}; it has {', '.join(list(own)[:3])}, ...")
            if own[name].shape != value.shape:
                raise UserError(
                    f"Weight {name!r} of the {self.role} model has shape {list(own[name].shape)}, not "
                    f"{list(value.shape)}."
                )
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)


def load_members(contrast: ContrastConfig, options: LoadOptions, device: torch.device, *, packed: bool) -> list[Member]:
    """The models of ``contrast`` from their folders, the deciding one first.

    A negative adapter on the positive model's folder shares the positive model's weights; other adapters are merged.
    """
    folders = {role: Path(path).expanduser() for role, path in contrast.models.items()}
    members: list[Member] = []
    for role, folder in folders.items():
        shared = role == "negative" and base_of(folder) != folder and base_of(folder).samefile(folders["positive"])
        loaded = load(folder, options)
        if shared:
            positive = next(member for member in members if member.role == "positive")
            positive.model, positive.adapter = loaded.model, False
            members.append(Member(role, loaded.model, loaded.tokenizer, adapter=True))
        else:
            model = merged(loaded.model) if isinstance(loaded.model, PeftModel) else loaded.model
            members.append(Member(role, model, loaded.tokenizer))
    return prepare_members(members, device, packed=packed)


def members_of(
    models: Mapping[Role, LoadedModel], contrast: ContrastConfig, device: torch.device, *, packed: bool
) -> list[Member]:
    """Members from models in memory, which stay the caller's own: what is trained elsewhere shows here at once."""
    if set(models) != set(contrast.models):
        raise UserError(f"The contrast has the models {', '.join(contrast.models)}; given are {', '.join(models)}.")
    members = [Member(role, models[role].model, models[role].tokenizer) for role in contrast.models]
    return prepare_members(members, device, packed=packed)


def prepare_members(members: list[Member], device: torch.device, *, packed: bool) -> list[Member]:
    """The models on ``device``, with what makes decoding quick."""
    for member in members:
        model: Any = plain(member.model)
        member.model.to(device).eval()  # type: ignore[arg-type]
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(GROUPED)
        if packed:
            pack(member.model)
    return members


def release(members: list[Member]) -> None:
    """Undo what :func:`prepare_members` did to the models, but for the device."""
    for member in members:
        model: Any = plain(member.model)
        if model.config._attn_implementation == GROUPED:
            model.set_attn_implementation("sdpa")
        unpack(member.model)


def prefill_cache() -> DynamicCache:
    """A cache for prompts that keeps everything, also where attention looks at a window only: its mask sees to that."""
    return DynamicCache()
