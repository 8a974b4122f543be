"""The contrast as a vLLM model: two or three sub-models with their own caches, whose logits are the contrast.

So scheduling, continuous batching, paged attention, tensor parallelism and streaming are vLLM's. Every sub-model sees
the same tokens in the same step; their hidden states travel side by side to ``compute_logits``, where only the rows
that need a next token are left.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.sequence import IntermediateTensors
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from isoray.generation.contrast import Form, Role, fuse, weights
from isoray.generation.vllm_plugin import KEY


class Rows:
    """What the requests in vLLM's running batch ask for, by row; vLLM says which row is whose before each step."""

    def __init__(self) -> None:
        self.asked: dict[int, dict[str, Any]] = {}
        """Of each row that asks for something: ``id``, and where given ``alpha``, ``gamma``, ``forbid`` (token ids)."""
        self.size = 0
        self.broken: dict[str, list[str]] = {}
        """The requests for which models gave numbers that are none: which models."""
        self.changed = True


_ROWS: WeakValueDictionary[str, Rows] = WeakValueDictionary()


def rows_of(vllm_config: VllmConfig) -> Rows:
    """The rows of the engine that ``vllm_config`` belongs to: shared by its model and its logits processor."""
    rows = _ROWS.get(vllm_config.instance_id)
    if rows is None:
        rows = _ROWS[vllm_config.instance_id] = Rows()
    return rows


class RowParameters(LogitsProcessor):
    """Tells the model which row of the batch asks for which parameters; leaves the logits alone.

    vLLM tells its logits processors of every change of the batch before the step in which it counts.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.rows = rows_of(vllm_config)

    def is_argmax_invariant(self) -> bool:
        """True: it changes nothing."""
        return True

    def apply(self, logits: Tensor) -> Tensor:
        """``logits``."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Take over who was removed, added and moved, in this order."""
        if batch_update is None:
            return
        asked, self.rows.size, self.rows.changed = self.rows.asked, batch_update.batch_size, True
        for index in batch_update.removed:
            asked.pop(index, None)
        for index, params, _, _ in batch_update.added:
            asked[index] = _asked(params)
        for source, target, direction in batch_update.moved:
            one, other = asked.pop(source, {}), asked.pop(target, {})
            asked[target] = one
            if direction == MoveDirectionality.SWAP:
                asked[source] = other


def _asked(params: SamplingParams) -> dict[str, Any]:
    found = (params.extra_args or {}).get(KEY)
    return dict(found) if isinstance(found, dict) else {}


class ContrastForCausalLM(nn.Module):
    """The models of a contrast folder; ``compute_logits`` is the one operator of :mod:`isoray.generation.contrast`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("a contrast cannot be split into pipeline stages; use tensor parallelism")
        config = vllm_config.model_config.hf_config
        spec: dict[str, Any] = getattr(config, KEY)
        self.folders: dict[Role, str] = spec["models"]
        self.form: Form = spec["form"]
        self.alpha, self.gamma = float(spec["alpha"]), float(spec["gamma"])
        self.vocabulary: int = spec["vocabulary"]
        self.width = int(config.get_text_config().vocab_size)
        eos = config.eos_token_id
        self.end = int(eos[0] if isinstance(eos, list) else eos or 0)
        self.parts = nn.ModuleDict()
        self.sizes: list[int] = []
        for role, folder in self.folders.items():
            part_config = AutoConfig.from_pretrained(folder, local_files_only=True)
            with set_model_tag(f"{KEY}_{role}"):  # each is compiled for itself
                self.parts[role] = init_vllm_registered_model(
                    vllm_config,
                    prefix=maybe_prefix(prefix, role),
                    hf_config=part_config,
                    architectures=part_config.architectures,
                )
            self.sizes.append(int(part_config.get_text_config().hidden_size))
        self.rows = rows_of(vllm_config)
        self.alone: Role | None = None
        """Set while texts are scored: the model whose logits come out, instead of the contrast."""
        self.unsound = False
        """Whether any model gave numbers that are none while texts were scored."""
        self._parameters_MB: tuple[Tensor, Tensor, Tensor | None] | None = None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Part of vLLM's interface; the models embed the tokens themselves."""
        raise NotImplementedError("a contrast takes token ids: its models have embeddings of their own")

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The models' hidden states side by side: [tokens, sum of hidden sizes]."""
        return torch.cat([part(input_ids, positions) for part in self.parts.values()], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The contrast of each row, float32 [rows, vocabulary]; None where tensor parallelism gathers elsewhere."""
        states = torch.split(hidden_states, self.sizes, dim=-1)
        logits: dict[str, Tensor] = {}
        for (role, part), state in zip(self.parts.items(), states, strict=True):
            if self.alone in (None, role):
                found: Tensor | None = part.compute_logits(state.contiguous())  # type: ignore[operator]
                if found is None:
                    return None
                logits[role] = found[:, : self.vocabulary]
        if self.alone is not None:
            self.unsound = self.unsound or bool(hidden_states.isnan().any())
            return self._padded(logits[self.alone].float())
        weights_MB, alpha_B, forbidden_BV = self._row_parameters(len(hidden_states), hidden_states.device)
        scores_BV, broken_B = fuse(list(logits.values()), weights_MB, alpha_B, forbidden_BV)
        if bool(broken_B.any()):
            self._end_broken(scores_BV, broken_B, logits)
        return self._padded(scores_BV)

    def _row_parameters(self, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weights [models, rows], alphas [rows] and forbidden tokens [rows, vocabulary] of the batch."""
        known = self._parameters_MB
        if known is not None and not self.rows.changed and known[1].shape[0] == count:
            return known
        # While vLLM warms up there are rows without requests.
        asked = [self.rows.asked.get(row, {}) if count == self.rows.size else {} for row in range(count)]
        gammas = [float(one.get("gamma", self.gamma)) for one in asked]
        alphas = [float(one.get("alpha", self.alpha)) for one in asked]
        forbidden: Tensor | None = None
        if any(one.get("forbid") for one in asked):
            forbidden = torch.zeros(count, self.vocabulary, dtype=torch.bool)
            for row, one in enumerate(asked):
                forbidden[row, one.get("forbid", [])] = True
            forbidden = forbidden.to(device)
        if len(self.parts) == 1:
            factors, alphas = torch.ones(1, count), [0.0] * count
        else:
            factors = torch.tensor([weights(self.form, gamma) for gamma in gammas]).t().contiguous()
        self._parameters_MB = factors.to(device), torch.tensor(alphas, device=device), forbidden
        self.rows.changed = False
        return self._parameters_MB

    def _end_broken(self, scores_BV: Tensor, broken_B: Tensor, logits: dict[str, Tensor]) -> None:
        """Let rows without meaning end their text, and remember whose they are."""
        for row in broken_B.nonzero().flatten().tolist():
            scores_BV[row] = -math.inf
            scores_BV[row, self.end] = 0.0
            guilty = [role for role, values in logits.items() if not bool(values[row].logsumexp(-1).isfinite())]
            name = self.rows.asked.get(row, {}).get("id") if len(broken_B) == self.rows.size else None
            if name is not None:
                self.rows.broken.setdefault(name, guilty)

    def _padded(self, scores_BV: Tensor) -> Tensor:
        missing = self.width - scores_BV.shape[1]
        return nn.functional.pad(scores_BV, (0, missing), value=-math.inf) if missing > 0 else scores_BV
