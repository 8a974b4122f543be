"""The `search:` section is checked against the schema before anything is tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from isoray.config.load import load
from isoray.config.search import Choice, LogUniform, RandInt
from isoray.errors import UserError


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "toy"))
    monkeypatch.chdir(tmp_path)


def config(search: str) -> str:
    Path("c.yaml").write_text(f"kind: toy_recipe:Toy\nparts: [{{steps: 1}}]\nsearch:\n{search}\n")
    return "c.yaml"


def test_dimensions_are_typed_and_apart_from_the_config() -> None:
    loaded = load(
        config(
            "  training.learning_rate: {kind: loguniform, low: 1e-5, high: 1e-2}\n"
            "  training.steps: {kind: randint, low: 1, high: 9}\n"
            "  engine: {kind: choice, values: [fast, {kind: slow, patience: 2}]}\n"
            "  engine.wheels: {kind: grid, values: [1, 2]}\n"
            "  parts.0.learning_rate: {kind: uniform, low: 0.1, high: 0.2}\n"
        )
    )
    assert isinstance(loaded.search["training.learning_rate"], LogUniform)
    assert loaded.search["training.steps"] == RandInt(kind="randint", low=1, high=9)
    assert isinstance(loaded.search["engine"], Choice)
    assert "search" not in loaded.config.model_dump()
    assert loaded.config.digest() == load(config("  seed: {kind: grid, values: [1]}")).config.digest()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("training.stepz: {kind: grid, values: [1]}", "value 1: unknown key; did you mean 'steps'?"),
        ("engine.sped: {kind: grid, values: [1]}", "value 1: unknown key; did you mean 'speed'?"),
        ("training.learning_rate: {kind: loguniform, low: 1e-5, high: 2}", "high=2.0: expected less than 1, got 2.0"),
        ("training.steps: {kind: uniform, low: 1, high: 2.5}", "high=2.5: expected a valid integer"),
        ("training.steps: {kind: randint, low: 0, high: 5}", "low=0: expected greater than 0, got 0"),
        (
            "training.schedule: {kind: choice, values: [linear, liner]}",
            "value 'liner': expected 'constant' or 'linear'",
        ),
        ("engine: {kind: choice, values: [fast, slwo]}", "value 'slwo': 'slwo' is no kind of toy_parts: did you mean"),
        ("parts.4.steps: {kind: grid, values: [1]}", "value 1: '4' is no position in a list of 1"),
        ("parts.x.steps: {kind: grid, values: [1]}", "value 1: 'x' is no position in a list of 1"),
        ("seed.x: {kind: grid, values: [1]}", "value 1: seed: expected a valid integer"),
    ],
)
def test_values_the_config_would_refuse_are_refused(line: str, message: str) -> None:
    path = line.partition(":")[0]
    with pytest.raises(UserError) as caught:
        load(config(f"  {line}"))
    assert str(caught.value).startswith(f"c.yaml:4: search.{path}: {message}")


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        ("{kind: uniform, low: 2, high: 1}", "low (2.0) must be below high (1.0)"),
        ("{kind: loguniform, low: 0, high: 1}", "low: expected greater than 0, got 0"),
        ("{kind: loguniforn, low: 1, high: 2}", "'loguniforn' is no kind of this; did you mean 'loguniform'"),
        ("{kind: choice, values: []}", "values: List should have at least 1 item"),
        ("{kind: randint, low: 1, hihg: 2}", "hihg: unknown key; did you mean 'high'?"),
        ("{low: 1, high: 2}", "expected a mapping with a 'kind'"),
        ("[1, 2]", "expected a"),
    ],
)
def test_broken_dimensions_are_told(dimension: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(config(f"  training.steps: {dimension}"))
    assert "search.training.steps" in str(caught.value)
    assert message in str(caught.value)


def test_the_section_must_be_a_mapping() -> None:
    with pytest.raises(UserError, match="search: expected a valid dictionary"):
        load(config("  - seed"))
