"""From the models' logits to the next tokens of all requests under way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isoray.generation.contrast import ContrastConfig, Fused, Role, fuse, weights
from isoray.generation.engine import Delta, failed, not_numbers
from isoray.generation.sampling import COLDEST, SamplingConfig, draw, draw_several
from isoray.generation.sequences import Beams, Single

Sequences = Sequence[Single | Beams]


@dataclass
class Choice:
    """What a step brought."""

    deltas: list[Delta] = field(default_factory=list)
    ended: list[Single | Beams] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    """Rows in which some model gave numbers that are none; their requests have ended."""
    parents: dict[int, int] = field(default_factory=dict)
    """Row of a beam -> the row that it goes on from."""


def choose(tasks: Sequences, logits: Sequence[Tensor], contrast: ContrastConfig, ends: frozenset[int]) -> Choice:
    """The next tokens of ``tasks`` from the logits [R, V] of each model, in the order of the tasks and their rows.

    ``ends``: the end-of-text tokens.
    """
    params = [task.task.request.sampling for task in tasks for _ in task.rows]
    fused = _fused(logits, params, contrast, ends)
    normaliser_R = fused.scores_BV.logsumexp(-1) if contrast.normalise else fused.scores_BV.new_zeros(len(params))
    choice = Choice()
    broken = fused.broken_B.tolist()
    singles: list[tuple[int, Single]] = []
    end = 0
    for task in tasks:
        begin, end = end, end + len(task.rows)
        if any(broken[begin:end]):
            reason = not_numbers(_guilty([values[begin:end] for values in logits], contrast))
            choice.deltas.append(failed(task.task.request, reason, prompt_tokens=len(task.task.prompt_ids)))
            choice.ended.append(task)
            choice.broken += task.rows
        elif isinstance(task, Single):
            singles.append((begin, task))
        else:
            _advance(task, fused.scores_BV[begin:end] - normaliser_R[begin:end, None], choice)
    if singles:
        _draw(singles, fused.scores_BV, normaliser_R, params, choice)
    return choice


def _fused(
    logits: Sequence[Tensor], params: Sequence[SamplingConfig], contrast: ContrastConfig, ends: frozenset[int]
) -> Fused:
    device = logits[0].device
    if len(logits) == 1:
        weights_MB, alphas = torch.ones(1, len(params)), [0.0] * len(params)
    else:
        gammas = [contrast.gamma if one.gamma is None else one.gamma for one in params]
        weights_MB = torch.tensor([weights(contrast.resolved_form, gamma) for gamma in gammas]).t()
        alphas = [contrast.alpha if one.alpha is None else one.alpha for one in params]
    forbidden = None
    rows = [row for row, one in enumerate(params) if one.eos == "forbid"]
    if rows and ends:
        forbidden = torch.zeros(logits[0].shape, dtype=torch.bool, device=device)
        forbidden[torch.tensor(rows)[:, None], torch.tensor(sorted(ends))[None, :]] = True
    return fuse(logits, weights_MB.to(device), torch.tensor(alphas, device=device), forbidden)


def _guilty(logits: Sequence[Tensor], contrast: ContrastConfig) -> list[Role]:
    return [
        role
        for role, values in zip(contrast.models, logits, strict=True)
        if not bool(torch.log_softmax(values.float(), -1).amax(-1).isfinite().all())
    ]


def _draw(
    singles: Sequence[tuple[int, Single]],
    scores_RV: Tensor,
    normaliser_R: Tensor,
    params: Sequence[SamplingConfig],
    choice: Choice,
) -> None:
    """The next token of each text that is drawn token by token, whose row of the scores is given with it."""
    rows = [row for row, _ in singles]
    if len(rows) < len(params):
        scores_RV, normaliser_R, params = scores_RV[rows], normaliser_R[rows], [params[row] for row in rows]
    uniform_R = torch.tensor([task.uniform() for _, task in singles], dtype=torch.float64, device=scores_RV.device)
    tokens_R = draw(scores_RV, uniform_R, params)
    log_probs_R = scores_RV.gather(1, tokens_R[:, None]).squeeze(1) - normaliser_R
    for (_, task), token, log_prob in zip(singles, tokens_R.tolist(), log_probs_R.tolist(), strict=True):
        delta = task.push(token, log_prob)
        choice.deltas.append(delta)
        if delta.completion is not None:
            choice.ended.append(task)


def _advance(beams: Beams, scores_KV: Tensor, choice: Choice) -> None:
    """Let ``beams`` go on by their next tokens' scores (normalised or raw)."""
    vocabulary = scores_KV.shape[1]
    totals_K = torch.tensor([beam.total for beam in beams.beams], dtype=torch.float64, device=scores_KV.device)
    totals_N = (scores_KV + totals_K[:, None]).flatten()
    if beams.greedy:
        chosen = totals_N.topk(min(beams.candidates, len(totals_N))).indices
    else:
        temperature = max(beams.task.request.sampling.temperature, COLDEST)
        chosen = draw_several(totals_N / temperature, beams.uniforms_now())
    chosen = chosen[totals_N[chosen].argsort(descending=True, stable=True)]
    values = zip(chosen.tolist(), scores_KV.flatten()[chosen].tolist(), totals_N[chosen].tolist(), strict=True)
    parents = beams.push(
        [
            (index // vocabulary, index % vocabulary, score, total)
            for index, score, total in values
            if not math.isinf(total)
        ]
    )
    if parents is None:
        choice.deltas.append(beams.result())
        choice.ended.append(beams)
    else:
        choice.parents |= {row: beams.rows[parent] for row, parent in zip(beams.rows, parents, strict=True)}
