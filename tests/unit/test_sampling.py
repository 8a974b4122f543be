"""Drawing tokens: distributions, cuts, independence of the rows, what the config refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from generating import slow_draw
from pydantic import ValidationError
from scipy import stats

from isoray.generation.sampling import SamplingConfig, draw, draw_several, seed_of, uniforms

TOKENS = 30


def scores_of(rows: int, seed: int = 0) -> torch.Tensor:
    scores = 2 * torch.randn(rows, TOKENS, generator=torch.Generator().manual_seed(seed))
    scores[:, ::7] = -math.inf
    return scores


def chance(count: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(uniforms(seed, count))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.5},
    {"temperature": 1e-300},
    {"temperature": 30.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 10_000},
    {"top_p": 0.5},
    {"top_p": 1e-9},
    {"top_k": 4, "top_p": 0.8, "temperature": 1.5},
]


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_tokens_are_those_of_the_slow_way(given: dict[str, Any]) -> None:
    scores, uniform, params = scores_of(200), chance(200), SamplingConfig(**given)
    got = draw(scores, uniform, [params] * 200).tolist()
    slow = SamplingConfig(**(given | ({"temperature": 0} if given.get("temperature") == 1e-300 else {})))
    assert got == [slow_draw(row.double().numpy(), float(u), slow) for row, u in zip(scores, uniform, strict=True)]


def test_a_row_does_not_hang_on_the_others() -> None:
    scores, uniform = scores_of(len(SETTINGS)), chance(len(SETTINGS))
    scores[:, 3:12] = 1.0  # what is equal is cut in the same way in any company
    params = [SamplingConfig(**given) for given in SETTINGS]
    together = draw(scores, uniform, params)
    alone = [draw(scores[[row]], uniform[[row]], [one]) for row, one in enumerate(params)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_equal_scores_at_the_cut_stay_together() -> None:
    scores = torch.zeros(4000, 6)
    scores[:, 0] = -5.0
    drawn = draw(scores, chance(4000), [SamplingConfig(top_k=2)] * 4000).tolist()
    assert set(drawn) == {1, 2, 3, 4, 5}


def test_the_distribution_is_the_softmax() -> None:
    scores, count = scores_of(1), 20_000
    drawn = draw(scores.expand(count, -1), chance(count), [SamplingConfig()] * count)
    probabilities = torch.softmax(scores[0].double(), -1).numpy()
    seen = np.bincount(drawn.numpy(), minlength=TOKENS)
    assert seen[probabilities == 0].sum() == 0
    possible = probabilities > 0
    assert stats.chisquare(seen[possible], probabilities[possible] * count).pvalue > 1e-3


def test_the_ends_of_the_unit_interval() -> None:
    scores = torch.tensor([[-math.inf, 0.0, -200.0, 1.0, -math.inf]] * 2)
    edges = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert draw(scores, edges, [SamplingConfig()] * 2).tolist() == [1, 3]
    assert draw(scores, edges, [SamplingConfig(top_k=4)] * 2).tolist() == [1, 3]


def test_several_are_drawn_without_putting_back() -> None:
    scores = torch.tensor([0.0, 1.0, -math.inf, 2.0, 0.5])
    assert sorted(draw_several(scores, uniforms(0, 9)).tolist()) == [0, 1, 3, 4]
    drawn = [tuple(draw_several(scores, uniforms(seed, 2)).tolist()) for seed in range(6000)]
    p = torch.softmax(scores.double(), -1).tolist()
    pairs = [(a, b) for a in (0, 1, 3, 4) for b in (0, 1, 3, 4) if a != b]
    expected = [p[a] * p[b] / (1 - p[a]) * len(drawn) for a, b in pairs]
    assert stats.chisquare([drawn.count(pair) for pair in pairs], expected).pvalue > 1e-3


def test_chance_hangs_on_the_seed_alone() -> None:
    assert uniforms(5, 3).tolist() == uniforms(5, 300)[:3].tolist()
    assert uniforms(5, 3).tolist() != uniforms(6, 3).tolist()
    assert uniforms(-1, 2).tolist() == uniforms(2**64 - 1, 2).tolist()
    seeds = [seed_of(seed, index) for seed in range(20) for index in range(200)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 11) != seed_of(11, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beams": 4, "top_k": 50}, "leave out them or `beams`"),
        ({"beams": 2, "top_p": 0.9}, "leave out them or `beams`"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"gamma": math.nan}, "gamma"),
        ({"gamma": 1e7}, "or .inf"),
        ({"alpha": 2}, "alpha"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
    ],
)
def test_what_cannot_be_drawn(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplingConfig(**given)


def test_settings_survive_json() -> None:
    config = SamplingConfig(gamma=math.inf, stop=("a", "b"), beams=4)
    assert SamplingConfig.model_validate(config.model_dump(mode="json")) == config
    assert SamplingConfig(gamma=None).model_dump(mode="json")["gamma"] is None
