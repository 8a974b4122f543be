"""The models of a contrast as the Transformers engine runs them, all on one device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import Cache

from isoray.errors import UserError
from isoray.generation.contrast import ContrastConfig, Role
from isoray.generation.decoding import Quickened
from isoray.models.adapters import merged
from isoray.models.config import LoadOptions
from isoray.models.gguf import read_gguf
from isoray.models.load import DTYPES, LoadedModel, base_of, load
from isoray.models.locate import Location, fetch, locate
from isoray.models.structure import plain

CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "seq_length")
"""Where configs say for how long texts a model was made."""
WINDOW_KEYS = ("sliding_window", "attention_chunk_size", "window_size")
"""Where configs say how far attention looks."""
ATTENTION_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
"""Layers that keep keys and values and nothing else."""


@dataclass
class Member:
    """One model of a contrast."""

    role: Role
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerFast
    adapter: bool | None = None
    """Of a model that two members share: whether this one is the model with its adapter, or without; None: not
    shared."""
    quickened: Quickened | None = None
    compiled: Callable[..., Any] | None = None
    """What decodes in place of the model."""
    takes: frozenset[str] = field(init=False)
    """Names of the inputs of its forward pass."""

    def __post_init__(self) -> None:
        inner = plain(self.model)
        if inner.config.is_encoder_decoder:
            raise UserError(f"The {self.role} model is an encoder-decoder; a contrast takes decoder-only models.")
        self.takes = frozenset(inspect.signature(inner.forward).parameters)
        kinds = getattr(self.config, "layer_types", None) or []
        plain_cache = "past_key_values" in self.takes and all(kind in ATTENTION_KINDS for kind in kinds)
        if inner._is_stateful or not plain_cache:
            raise UserError(
                f"The {self.role} model ({self.config.model_type}) keeps something else of its text than keys and "
                "values, which the Transformers engine cannot do for texts of different lengths; use the vLLM engine."
            )

    @property
    def config(self) -> Any:
        """What Transformers knows of the model."""
        return plain(self.model).config.get_text_config()

    @property
    def vocabulary(self) -> int:
        """Size of the output layer, padding included."""
        model: Any = plain(self.model)
        return int(model.get_output_embeddings().weight.shape[0])

    @property
    def context(self) -> int | None:
        """The longest sequence that the model was made for, if its config tells."""
        lengths = [getattr(self.config, key, None) for key in CONTEXT_KEYS]
        return next((length for length in lengths if isinstance(length, int) and length > 0), None)

    def check_fixed_shapes(self, context: int) -> None:
        """Raise UserError for a model that makes masks of its own: for windows within ``context`` tokens, or ALiBi."""
        windows = [getattr(self.config, key, None) for key in WINDOW_KEYS]
        alibi = getattr(self.config, "alibi", False) or self.config.model_type in ("bloom", "mpt")
        if alibi or any(isinstance(window, int) and window < context for window in windows):
            raise UserError(
                f"The {self.role} model ({self.config.model_type}) has attention windows or ALiBi, which "
                "`static_cache` cannot serve; leave it out."
            )

    def forward(self, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor | None, cache: Cache, *, step: bool) -> Tensor:
        """Logits [B, V] after the last of T tokens, in the model's dtype; keys and values go into ``cache``.

        ``mask`` (bool): which of the cached and the new tokens are no padding [B, C], or may be attended to
        [B, 1, T, C]. ``step`` tells a decoding step.
        """
        inputs: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if "position_ids" in self.takes:
            inputs["position_ids"] = positions_BT
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        if mask is not None and mask.dim() == 4 and self.config._attn_implementation == "eager":
            dtype = plain(self.model).dtype  # added to the scores
            inputs["attention_mask"] = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        model = self.compiled if self.compiled is not None and step else self.model
        return self._run(model, input_ids=ids_BT, **inputs)[:, -1]

    def log_probs(self, ids_BT: Tensor, mask_BT: Tensor, vocabulary: int) -> Tensor:
        """Log-probability [B, T - 1] of each token but the first (float32), for texts padded on the right."""
        logits_BTV = self._run(self.model, input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        rows = []
        for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True):  # row by row: log-softmax takes twice the memory
            log_probs_TV = torch.log_softmax(logits_TV[:-1, :vocabulary].float(), dim=-1)
            rows.append(log_probs_TV.gather(1, ids_T[1:, None]).squeeze(1))
        return torch.stack(rows)

    def _run(self, model: Callable[..., Any], **inputs: Any) -> Tensor:
        without = cast(PeftModel, self.model).disable_adapter() if self.adapter is False else nullcontext()
        with without, self.quickened.running() if self.quickened else nullcontext():
            return cast(Tensor, model(**inputs).logits)

    def update(self, weights: Mapping[str, Tensor] | Path, options: LoadOptions) -> None:
        """Overwrite the weights that are named, or all by those of a folder, in place; see :meth:`Engine.update`.

        Of an adapter that shares its model's weights, in the names of its own files.
        """
        if self.adapter is False:
            raise UserError(
                f"The {self.role} model shares its weights with the negative one, an adapter on it, which would change "
                "as well; give the negative model as a folder of its own."
            )
        if self.adapter:
            own = get_peft_model_state_dict(self.model)
            given = load_file(weights / "adapter_model.safetensors") if isinstance(weights, Path) else weights
        else:
            own = self.model.state_dict()
            given = _whole(load(weights, options).model).state_dict() if isinstance(weights, Path) else weights
        self._check(given, own, all_of_them=isinstance(weights, Path))
        if self.adapter:
            set_peft_model_state_dict(self.model, dict(given))
            return
        with torch.no_grad():
            for name, value in given.items():
                own[name].copy_(value)

    def _check(self, given: Mapping[str, Tensor], own: Mapping[str, Tensor], *, all_of_them: bool) -> None:
        missing = [name for name in own if name not in given] if all_of_them else []
        for name in [*given, *missing]:
            if name not in own:
                raise UserError(f"The {self.role} model has no weight {name!r}; it has {', '.join(list(own)[:3])}, ...")
            if name not in given:
                raise UserError(f"The folder lacks weight {name!r} of the {self.role} model.")
            if own[name].shape != given[name].shape:
                raise UserError(
                    f"Weight {name!r} of the {self.role} model has shape {list(own[name].shape)}, not "
                    f"{list(given[name].shape)}."
                )


def load_members(contrast: ContrastConfig, options: LoadOptions) -> list[Member]:
    """The models of ``contrast``, loaded; the deciding one first.

    A negative adapter on the positive model's folder shares the positive model's weights; other adapters are merged.
    """
    places: dict[Role, Location] = {}
    members: list[Member] = []
    for role, path in contrast.models.items():
        place = places[role] = locate(path, what=f"the contrast's {role} model")
        if place.kind == "hub":
            folder = fetch(path, code=options.trust_remote_code, what=f"the contrast's {role} model")
            place = places[role] = Location("transformers", folder)
        loaded = _load(place, options)
        if role == "negative" and place.kind == "adapter" and base_of(place.path).samefile(places["positive"].path):
            positive = members[-1]
            positive.model, positive.adapter = loaded.model, False
            members.append(Member(role, loaded.model, loaded.tokenizer, adapter=True))
        else:
            members.append(Member(role, _whole(loaded.model), loaded.tokenizer))
    return members


def members_of(models: Mapping[Role, LoadedModel], contrast: ContrastConfig) -> list[Member]:
    """Members from models in memory, which stay the caller's own: what is trained elsewhere shows here at once.

    A negative model that is an adapter on the very object that is the positive model shares its weights.
    """
    if set(models) != set(contrast.models):
        raise UserError(f"The contrast has the models {', '.join(contrast.models)}; given are {', '.join(models)}.")
    members = [Member(role, models[role].model, models[role].tokenizer) for role in contrast.models]
    negative, positive = members[-1], members[-2 if len(members) > 1 else -1]
    if isinstance(negative.model, PeftModel) and positive.model is negative.model.get_base_model():
        positive.model, positive.adapter, negative.adapter = negative.model, False, True
    return members


def _load(place: Location, options: LoadOptions) -> LoadedModel:
    if place.kind == "gguf":
        model, tokenizer = read_gguf(place.path)
        return LoadedModel(model.to(DTYPES[options.dtype]).eval(), tokenizer, "causal")  # type: ignore[arg-type]
    return load(place.path, options)


def _whole(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return merged(model) if isinstance(model, PeftModel) else model


def ready(members: list[Member], device: torch.device, *, packed: bool) -> None:
    """Put the models on ``device``, with what makes decoding quick."""
    quickened: dict[int, Quickened] = {}
    for member in members:
        member.model.to(device)  # type: ignore[arg-type]
        inner = plain(member.model)
        if id(inner) not in quickened:
            quickened[id(inner)] = Quickened(inner, packed=packed)
        member.quickened = quickened[id(inner)]
