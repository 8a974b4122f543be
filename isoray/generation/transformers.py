"""The Transformers engine: every model with a cache of its own, all in step, finished rows filled again at once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers.cache_utils import DynamicCache

from isoray.errors import DataError, UserError
from isoray.generation.cache import Slots
from isoray.generation.contrast import ContrastConfig, Fused, Role, fuse, weights
from isoray.generation.engine import Delta, Engine, Prompt, Request, TokenScores, failed
from isoray.generation.members import Member, load_members, members_of, prefill_cache, release
from isoray.generation.sampling import SamplingConfig, draw, draw_several
from isoray.generation.sequences import Beams, Single, Task
from isoray.generation.vocabulary import shared_vocabulary
from isoray.models.config import Dtype, LoadOptions
from isoray.models.load import LoadedModel
from isoray.models.structure import plain

_Item = TypeVar("_Item")
PREFILL_TOKENS = 16384
"""Prompts are computed together up to so many tokens, padding included."""


class TransformersEngine(Engine):
    """Runs whatever Transformers runs, in this process; beams and in-place training of its models are this engine's."""

    class Config(Engine.Config):
        """The Transformers engine."""

        kind: Literal["transformers"] = "transformers"
        """Transformers models in the process itself."""
        dtype: Dtype = "fp32"
        """How weights are held and computed with; the contrast itself is always taken in float32."""
        attention: str = "sdpa"
        """Transformers' attention implementation."""
        device: str = "auto"
        """A torch device; `auto`: the GPU if there is one."""
        cache: Literal["separate", "shared"] = "separate"
        """`shared`: all models attend to the deciding model's keys and values, as UniDetox's published code does by
        mistake. To reproduce it only."""
        static_cache: bool = False
        """Caches of full length and fixed shapes: more arithmetic in each step, but nothing is compiled anew."""
        compile: bool = False
        """Compile each model's decoding step with torch.compile; goes with `static_cache`."""
        trust_remote_code: bool = False
        """Run the Python code that comes with a model. Only for models whose code you have read."""

    config: Config

    def __init__(
        self, config: Config, contrast: ContrastConfig, models: Mapping[Role, LoadedModel] | None = None
    ) -> None:
        """``models``: those of the contrast, in memory; left out, they are loaded from their folders.

        Models given stay the caller's: training them between requests changes what is generated.
        """
        super().__init__(config)
        if config.compile and not config.static_cache:
            raise UserError("generation with `compile` needs `static_cache`: a growing cache would compile every step.")
        self.contrast = contrast
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        options = LoadOptions(
            dtype=config.dtype, attention=config.attention, trust_remote_code=config.trust_remote_code
        )
        if models is None:
            self.members = load_members(contrast, options, self.device, packed=not config.compile)
        else:
            self.members = members_of(models, contrast, self.device, packed=not config.compile)
        if config.static_cache:
            for member in self.members:
                member.check_fixed_shapes()
        if config.compile:
            for member in self.members:
                member.compiled = torch.compile(member.model)
        self.tokenizer = self.members[0].tokenizer
        self.vocabulary = shared_vocabulary(
            {member.role: member.tokenizer for member in self.members},
            {member.role: member.vocabulary for member in self.members},
        )
        self.context = min(
            length for length in (config.context, *(member.context for member in self.members)) if length is not None
        )
        self._eos = end_tokens(self.members[0])
        self._waiting: deque[Request] = deque()
        self._tasks: list[Single | Beams] = []
        self._slots = self._new_slots()

    @property
    def busy(self) -> bool:
        """Whether some request is waiting or under way."""
        return bool(self._waiting or self._tasks)

    def add(self, request: Request) -> None:
        """Take a request; it starts as soon as there is room."""
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Drop a request, if it is still there."""
        self._waiting = deque(request for request in self._waiting if request.id != request_id)
        self._free([task for task in self._tasks if task.task.request.id == request_id])

    def close(self) -> None:
        """Free the models."""
        release(self.members)
        self.members, self._tasks = [], []
        self._slots.caches.clear()

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """Start waiting requests where enough rows are free; else draw the next token of each request under way."""
        if self._waiting and self._has_room():
            return self._start()
        return self._decode() if self._tasks else []

    @torch.no_grad()
    def score(self, texts: Sequence[Prompt]) -> list[TokenScores]:
        """Log-probabilities of given texts under each model, in the order of ``texts``."""
        scores: dict[int, TokenScores] = {}
        sound: list[tuple[int, list[int]]] = []
        for index, text in enumerate(texts):
            try:
                sound.append((index, self.encode(text, new_tokens=0)))
            except DataError as error:
                scores[index] = TokenScores((), {}, f"text {index}: {error}")
        sound.sort(key=lambda item: len(item[1]))
        for batch in _by_tokens(sound, PREFILL_TOKENS // 4):
            lengths = [len(ids) for _, ids in batch]
            ids_BT, mask_BT = padded([ids for _, ids in batch], self.device, left=False)
            found = {member.role: member.log_probs(ids_BT, mask_BT, self.vocabulary).cpu() for member in self.members}
            for row, (index, ids) in enumerate(batch):
                log_probs = {role: tuple(values[row, : lengths[row] - 1].tolist()) for role, values in found.items()}
                scores[index] = TokenScores(tuple(ids), log_probs)
        return [scores[index] for index in range(len(texts))]

    def update(self, role: Role, weights: Mapping[str, Tensor] | Path) -> None:
        """Replace weights of one model, in place."""
        assert not self._tasks, "weights change between requests only"
        member = next((member for member in self.members if member.role == role), None)
        if member is None:
            raise UserError(f"The contrast has no {role} model; it has {', '.join(self.contrast.models)}.")
        if isinstance(weights, Path):
            weights = {
                name: value for file in sorted(weights.glob("*.safetensors")) for name, value in load_file(file).items()
            }
        member.update(weights)

    def _new_slots(self) -> Slots:
        fixed = self.context + min(self.context, 256) if self.config.static_cache else None
        return Slots(self.config.slots, self.device, fixed=fixed)

    def _task(self, request: Request) -> Task:
        """``request``, if it can be answered; else DataError."""
        prompt_ids = self.encode(request.prompt)
        sampling = request.sampling
        if sampling.beams > self.config.slots:
            raise DataError(f"{sampling.beams} beams need as many slots; the engine has {self.config.slots}")
        limit = min(sampling.max_tokens, self.context - len(prompt_ids))
        return Task(request, prompt_ids, limit, self._eos if sampling.eos == "stop" else frozenset())

    def _has_room(self) -> bool:
        """Whether the request that waits longest should start now."""
        if not self._tasks:
            return True
        # One prompt at a time would cost as much as a step of all: wait for some rows to be free.
        wanted = max(self._waiting[0].sampling.beams, self.config.slots // 8)
        return self.config.slots - self._slots.rows >= wanted

    def _start(self) -> list[Delta]:
        """Compute the prompts of waiting requests and draw their first tokens."""
        deltas: list[Delta] = []
        tasks: list[Task] = []
        free = self.config.slots - self._slots.rows
        while self._waiting and (self._waiting[0].sampling.beams <= free or not (tasks or self._tasks)):
            request = self._waiting.popleft()
            try:
                task = self._task(request)
            except DataError as error:
                deltas.append(failed(request, str(error)))
                continue
            tasks.append(task)
            free -= task.width
            if free <= 0:
                break
        for batch in _by_tokens([(task, task.prompt_ids) for task in tasks], PREFILL_TOKENS):
            deltas += self._prefill([task for task, _ in batch])
        return deltas

    def _prefill(self, tasks: list[Task]) -> list[Delta]:
        ids_BT, mask_BT = padded([task.prompt_ids for task in tasks], self.device, left=True)
        positions_BT = (mask_BT.long().cumsum(-1) - 1).clamp_min(0)
        caches: dict[Role, DynamicCache] = {}
        logits: list[Tensor] = []
        mask = None if bool(mask_BT.all()) else mask_BT
        for member in self.members:
            caches[member.role] = prefill_cache()
            logits.append(member.forward(ids_BT, positions_BT, mask, caches[member.role])[:, : self.vocabulary])
        if self.config.cache == "shared":
            caches = {self.members[0].role: caches[self.members[0].role]}
        source = [index for index, task in enumerate(tasks) for _ in range(task.width)]
        first = self._slots.rows
        self._slots.append(
            cast("dict[str, Any]", caches), [len(task.prompt_ids) for task in tasks], [task.width for task in tasks]
        )
        started: list[Single | Beams] = []
        for task in tasks:
            sequence = self._sequence(task)
            for row in range(first, first + task.width):
                self._place(sequence, row)
            first += task.width
            started.append(sequence)
        self._tasks += started
        return self._draw(started, [values[source] for values in logits])

    def _sequence(self, task: Task) -> Single | Beams:
        tokenizer: Tokenizer = self.tokenizer.backend_tokenizer
        return Single(task, tokenizer) if task.width == 1 else Beams(task, tokenizer)

    def _place(self, sequence: Single | Beams, row: int) -> None:
        if isinstance(sequence, Single):
            sequence.row = row
        else:
            sequence.rows.append(row)

    def _decode(self) -> list[Delta]:
        """The next token of everything under way."""
        slots = self._slots
        last = torch.zeros(slots.columns.active, 1, dtype=torch.int64)
        for task in self._tasks:
            last[task.rows, 0] = torch.tensor(task.last_tokens)
        ids_R1, positions_R1, mask_RC = last.to(self.device), slots.columns.positions(), slots.columns.mask()
        logits: dict[Role, Tensor] = {}
        shared = self.config.cache == "shared"
        # The deciding model comes last: where all share its cache, its keys and values are the ones that stay.
        for member in reversed(self.members):
            cache = slots.caches[self.members[0].role if shared else member.role]
            logits[member.role] = member.forward(ids_R1, positions_R1, mask_RC, cache)[:, : self.vocabulary]
        slots.advance()
        return self._draw(self._tasks, [logits[member.role] for member in self.members], rows=True)

    def _draw(self, tasks: list[Single | Beams], logits: list[Tensor], *, rows: bool = False) -> list[Delta]:
        """Choose the next tokens of ``tasks`` from the models' logits: by engine row, or in the order of the tasks."""
        order = [row for task in tasks for row in task.rows]
        if rows and order != list(range(len(logits[0]))):
            logits = [values[order] for values in logits]
        params = [task.task.request.sampling for task in tasks for _ in task.rows]
        fused = self._fuse(logits, params)
        normaliser_R = (
            fused.scores_BV.logsumexp(-1) if self.contrast.normalise else fused.scores_BV.new_zeros(len(order))
        )
        deltas, ended = self._broken(tasks, logits, fused)
        place, singles = 0, list[tuple[int, Single]]()
        for task in tasks:
            span = slice(place, place + len(task.rows))
            place = span.stop
            if task in ended:
                continue
            if isinstance(task, Single):
                singles.append((span.start, task))
            elif delta := self._advance_beams(task, fused.scores_BV[span] - normaliser_R[span, None]):
                deltas.append(delta)
                ended.append(task)
        for (_, task), delta in zip(singles, self._draw_singles(singles, fused, normaliser_R, params), strict=True):
            deltas.append(delta)
            if delta.completion is not None:
                ended.append(task)
        self._free(ended)
        return deltas

    def _fuse(self, logits: list[Tensor], params: list[SamplingConfig]) -> Fused:
        form, contrast = self.contrast.resolved_form, self.contrast
        if len(logits) == 1:
            weights_MB, alphas = torch.ones(1, len(params)), [0.0] * len(params)
        else:
            gammas = [contrast.gamma if one.gamma is None else one.gamma for one in params]
            weights_MB = torch.tensor([weights(form, gamma) for gamma in gammas]).t()
            alphas = [contrast.alpha if one.alpha is None else one.alpha for one in params]
        forbidden = None
        rows = [row for row, one in enumerate(params) if one.eos == "forbid"]
        if rows and self._eos:
            forbidden = torch.zeros(logits[0].shape, dtype=torch.bool, device=self.device)
            forbidden[torch.tensor(rows)[:, None], torch.tensor(sorted(self._eos))[None, :]] = True
        return fuse(logits, weights_MB.to(self.device), torch.tensor(alphas, device=self.device), forbidden)

    def _draw_singles(
        self, singles: list[tuple[int, Single]], fused: Fused, normaliser_R: Tensor, params: list[SamplingConfig]
    ) -> list[Delta]:
        if not singles:
            return []
        places = [place for place, _ in singles]
        every = len(places) == len(params)
        scores_BV = fused.scores_BV if every else fused.scores_BV[places]
        uniform_B = torch.tensor([task.uniform() for _, task in singles], dtype=torch.float64, device=self.device)
        tokens_B = draw(scores_BV, uniform_B, [params[place] for place in places])
        log_probs_B = scores_BV.gather(1, tokens_B[:, None]).squeeze(1) - normaliser_R[places]
        drawn = zip(singles, tokens_B.tolist(), log_probs_B.tolist(), strict=True)
        return [task.push(token, log_prob) for (_, task), token, log_prob in drawn]

    def _advance_beams(self, beams: Beams, scores_KV: Tensor) -> Delta | None:
        """Let ``beams`` go on by their next token's scores (normalised or raw); the answer, if that was the last."""
        vocabulary, width = scores_KV.shape[1], beams.task.width
        totals_K = scores_KV.new_tensor([beam.total for beam in beams.beams])
        totals_N = (scores_KV + totals_K[:, None]).flatten()
        if beams.greedy:
            chosen = totals_N.topk(2 * width).indices
        else:
            chosen = draw_several(totals_N / beams.task.request.sampling.temperature, beams.uniforms_now())
        chosen = chosen[totals_N[chosen].argsort(descending=True, stable=True)]
        values = zip(chosen.tolist(), scores_KV.flatten()[chosen].tolist(), totals_N[chosen].tolist(), strict=True)
        candidates = [
            (index // vocabulary, index % vocabulary, score, total)
            for index, score, total in values
            if not math.isinf(total)
        ]
        parents = beams.push(candidates)
        if parents is None:
            return beams.result()
        self._slots.reorder(beams.rows, [beams.rows[parent] for parent in parents])
        return None

    def _broken(
        self, tasks: list[Single | Beams], logits: list[Tensor], fused: Fused
    ) -> tuple[list[Delta], list[Single | Beams]]:
        """The requests for which some model gave numbers that are none."""
        deltas: list[Delta] = []
        ended: list[Single | Beams] = []
        if not bool(fused.broken_B.any()):
            return deltas, ended
        place = 0
        for task in tasks:
            span = slice(place, place + len(task.rows))
            place = span.stop
            if bool(fused.broken_B[span].any()):
                guilty = [
                    member.role
                    for member, values in zip(self.members, logits, strict=True)
                    if not bool(torch.log_softmax(values[span].float(), -1).amax(-1).isfinite().all())
                ]
                reason = f"the {' and the '.join(guilty)} model gave logits that are not numbers (NaN or infinite)"
                deltas.append(failed(task.task.request, reason, prompt_tokens=len(task.task.prompt_ids)))
                ended.append(task)
                self._slots.wipe(task.rows)
        return deltas, ended

    def _free(self, tasks: list[Single | Beams]) -> None:
        """Give the rows of ended tasks back."""
        if not tasks:
            return
        self._tasks = [task for task in self._tasks if task not in tasks]
        moved = self._slots.remove([row for task in tasks for row in task.rows])
        for task in self._tasks:
            if isinstance(task, Single):
                task.row = moved.get(task.row, task.row)
            else:
                task.rows = [moved.get(row, row) for row in task.rows]


def end_tokens(member: Member) -> frozenset[int]:
    """The tokens that end a text, by the model's generation config and the tokenizer."""
    configured = plain(member.model).generation_config
    found = getattr(configured, "eos_token_id", None)
    ids = list(found) if isinstance(found, list | tuple) else [found]
    return frozenset(int(token) for token in (*ids, member.tokenizer.eos_token_id) if token is not None)


def padded(sequences: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] (int64), padded with 0, and the mask of what is not padding [B, T] (bool)."""
    length = max(map(len, sequences))
    ids_BT = torch.zeros(len(sequences), length, dtype=torch.int64)
    mask_BT = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        span = slice(length - len(sequence), length) if left else slice(0, len(sequence))
        ids_BT[row, span] = torch.tensor(sequence)
        mask_BT[row, span] = True
    return ids_BT.to(device), mask_BT.to(device)


def _by_tokens(items: Sequence[tuple[_Item, list[int]]], most: int) -> list[list[tuple[_Item, list[int]]]]:
    """``items`` in order, in batches of at most ``most`` tokens with padding (but of one item at least)."""
    batches: list[list[tuple[_Item, list[int]]]] = []
    longest = 0
    for item in items:
        longest = max(longest, len(item[1])) if batches else len(item[1])
        if batches and longest * (len(batches[-1]) + 1) <= most:
            batches[-1].append(item)
        else:
            batches.append([item])
            longest = len(item[1])
    return batches
