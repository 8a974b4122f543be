"""The Transformers engine: every model with a cache of its own, all in step, finished rows filled again at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from isoray.errors import DataError, UserError
from isoray.generation.choosing import choose
from isoray.generation.contrast import ContrastConfig, Role
from isoray.generation.engine import Delta, Engine, Prompt, Request, TokenScores, failed, token_scores
from isoray.generation.members import Member, load_members, members_of, ready
from isoray.generation.runner import Runner, by_tokens, check_members, padded
from isoray.generation.sequences import Beams, Single, Task
from isoray.generation.vocabulary import shared_vocabulary
from isoray.models.config import Dtype, LoadOptions
from isoray.models.load import LoadedModel
from isoray.models.structure import plain

PREFILL_TOKENS = 16384
"""Prompts are computed together up to so many tokens, padding included."""
SCORE_LOGITS = 2**28
"""Texts are scored together up to so many logits: 1 GiB in float32."""


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

        Models given stay the caller's, but for their device: training them between requests changes what is generated.
        Raises UserError for models that cannot be contrasted or run.
        """
        super().__init__(config)
        if config.compile and not config.static_cache:
            raise UserError("generation with `compile` needs `static_cache`: a growing cache would compile every step.")
        self.contrast = contrast
        self._options = LoadOptions(
            dtype=config.dtype, attention=config.attention, trust_remote_code=config.trust_remote_code
        )
        self._models_are_ours = models is None
        self.members = load_members(contrast, self._options) if models is None else members_of(models, contrast)
        self.tokenizer = self.members[0].tokenizer
        self.vocabulary: int = shared_vocabulary(
            {member.role: member.tokenizer for member in self.members},
            {member.role: member.vocabulary for member in self.members},
        )
        self.context = _context(config.context, self.members)
        self._ends = frozenset(token for token in _end_tokens(self.members[0]) if token < self.vocabulary)
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._tasks: list[Single | Beams] = []
        self._runner = self._started()
        if config.compile:
            for member in self.members:
                member.compiled = torch.compile(member.model)

    def _started(self) -> Runner:
        """The models on their device, tried out."""
        config = self.config
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        fixed = None
        if config.static_cache:
            fixed = self.context + min(self.context, 256)
            for member in self.members:
                member.check_fixed_shapes(self.context)
        shared = config.cache == "shared"
        ready(self.members, torch.device(device), packed=not config.compile)
        check_members(self.members, fixed=fixed, context=self.context, shared_cache=shared)
        return Runner(self.members, slots=config.slots, vocabulary=self.vocabulary, fixed=fixed, shared_cache=shared)

    @property
    def busy(self) -> bool:
        """Whether some request is waiting or under way."""
        return bool(self._waiting or self._tasks)

    def add(self, request: Request) -> None:
        """Take a request; it starts as soon as there is room."""
        assert request.id not in self._waiting, f"two requests have the id {request.id}"
        self._waiting[request.id] = request

    def cancel(self, request_id: str) -> None:
        """Drop a request, if it is still there."""
        self._waiting.pop(request_id, None)
        self._free([task for task in self._tasks if task.task.request.id == request_id])

    def close(self) -> None:
        """Free the models."""
        self._waiting.clear()
        self._tasks, self.members, self._runner.members = [], [], []
        self._runner.slots.caches.clear()

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """Start waiting requests where enough rows are free; else draw the next token of each request under way."""
        self._notice_new_weights()
        if self._waiting and self._has_room():
            return self._start()
        if not self._tasks:
            return []
        tokens = [0] * self._runner.slots.rows
        for task in self._tasks:
            for row, token in zip(task.rows, task.last_tokens, strict=True):
                tokens[row] = token
        logits = self._runner.step(tokens)
        order = [row for task in self._tasks for row in task.rows]
        if order != list(range(len(order))):
            logits = [values[order] for values in logits]
        return self._choose(self._tasks, logits)

    @torch.no_grad()
    def score(self, texts: Sequence[Prompt]) -> list[TokenScores]:
        """Log-probabilities of given texts under each model, in the order of ``texts``."""
        self._notice_new_weights()
        scores: dict[int, TokenScores] = {}
        sound: list[tuple[int, list[int]]] = []
        for index, text in enumerate(texts):
            try:
                sound.append((index, self.encode(text, new_tokens=0)))
            except DataError as error:
                scores[index] = TokenScores((), {}, f"text {index}: {error}")
        sound.sort(key=lambda item: len(item[1]))
        for batch in by_tokens([len(ids) for _, ids in sound], SCORE_LOGITS // self.vocabulary):
            ids_BT, mask_BT = padded([ids for _, ids in sound[batch]], self._runner.device, left=False)
            found = {member.role: member.log_probs(ids_BT, mask_BT, self.vocabulary).cpu() for member in self.members}
            for row, (index, ids) in enumerate(sound[batch]):
                log_probs = {role: values[row, : len(ids) - 1].tolist() for role, values in found.items()}
                scores[index] = token_scores(index, ids, log_probs)
        return [scores[index] for index in range(len(texts))]

    def update(self, role: Role, weights: Mapping[str, Tensor] | Path) -> None:
        """Replace weights of one model, in place."""
        assert not self._tasks, "weights change between requests only"
        member = next((member for member in self.members if member.role == role), None)
        if member is None:
            raise UserError(f"The contrast has no {role} model; it has {', '.join(self.contrast.models)}.")
        member.update(weights, self._options)
        self._forget_packed()

    def _notice_new_weights(self) -> None:
        """With no request under way, models that others hold may have been trained since they were last used."""
        if self._models_are_ours or self._tasks:
            return
        self._forget_packed()

    def _forget_packed(self) -> None:
        for member in self.members:
            assert member.quickened is not None
            member.quickened.forget()

    def _has_room(self) -> bool:
        """Whether the request that waits longest should start now."""
        if not self._tasks:
            return True
        slots = self.config.slots
        # One prompt at a time would cost as much as a step of all: wait for some rows to be free.
        wanted = max(self._next_width(), min(slots // 8, len(self._waiting)))
        return slots - self._runner.slots.rows >= wanted

    def _next_width(self) -> int:
        """How many rows the request needs that waits longest; none if it can only be refused."""
        beams = next(iter(self._waiting.values())).sampling.beams
        return beams if beams <= self.config.slots else 0

    def _start(self) -> list[Delta]:
        """Compute the prompts of waiting requests and draw their first tokens."""
        deltas: list[Delta] = []
        tasks: list[Task] = []
        free = self.config.slots - self._runner.slots.rows
        while self._waiting and self._next_width() <= free:
            _, request = self._waiting.popitem(last=False)
            try:
                tasks.append(self._task(request))
            except DataError as error:
                deltas.append(failed(request, str(error)))
                continue
            free -= tasks[-1].width
            if free == 0:
                break
        for batch in by_tokens([len(task.prompt_ids) for task in tasks], PREFILL_TOKENS):
            deltas += self._prefill(tasks[batch])
        return deltas

    def _task(self, request: Request) -> Task:
        """``request``, if it can be answered; else DataError."""
        prompt_ids = self.encode(request.prompt)
        sampling = request.sampling
        if sampling.beams > self.config.slots:
            raise DataError(f"{sampling.beams} beams need as many slots; the engine has {self.config.slots}")
        limit = min(sampling.max_tokens, self.context - len(prompt_ids))
        return Task(request, prompt_ids, limit, self._ends if sampling.eos == "stop" else frozenset())

    def _prefill(self, tasks: Sequence[Task]) -> list[Delta]:
        row = self._runner.slots.rows
        widths = [task.width for task in tasks]
        logits = self._runner.start([task.prompt_ids for task in tasks], widths)
        tokenizer: Tokenizer = self.tokenizer.backend_tokenizer
        started: list[Single | Beams] = []
        for task in tasks:
            rows = list(range(row, row + task.width))
            started.append(Single(task, tokenizer, row) if task.width == 1 else Beams(task, tokenizer, rows))
            row += task.width
        self._tasks += started
        if max(widths) > 1:
            source = [index for index, width in enumerate(widths) for _ in range(width)]
            logits = [values[source] for values in logits]
        return self._choose(started, logits)

    def _choose(self, tasks: Sequence[Single | Beams], logits: Sequence[Tensor]) -> list[Delta]:
        """Draw the next tokens of ``tasks`` and let the rows follow."""
        choice = choose(tasks, logits, self.contrast, self._ends)
        if choice.broken:
            self._runner.slots.wipe(choice.broken)
        self._runner.slots.reorder(choice.parents)
        self._free(choice.ended)
        return choice.deltas

    def _free(self, tasks: Sequence[Single | Beams]) -> None:
        """Give the rows of ended tasks back."""
        if not tasks:
            return
        self._tasks = [task for task in self._tasks if task not in tasks]
        moved = self._runner.slots.remove([row for task in tasks for row in task.rows])
        for task in self._tasks:
            if isinstance(task, Single):
                task.row = moved.get(task.row, task.row)
            else:
                task.rows = [moved.get(row, row) for row in task.rows]


def _end_tokens(member: Member) -> frozenset[int]:
    """The tokens that end a text, by the model's generation config and the tokenizer."""
    configured = plain(member.model).generation_config
    found = getattr(configured, "eos_token_id", None)
    ids = list(found) if isinstance(found, list | tuple) else [found]
    return frozenset(int(token) for token in (*ids, member.tokenizer.eos_token_id) if token is not None)


def _context(wanted: int | None, members: Sequence[Member]) -> int:
    lengths = [length for length in (wanted, *(member.context for member in members)) if length is not None]
    if not lengths:
        raise UserError("None of the models says how long a text may be; set the engine's `context`.")
    return min(lengths)
