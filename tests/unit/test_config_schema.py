"""The JSON Schema for editors accepts what loading accepts and expands every kind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from isoray.config.load import read_document, stock_configs
from isoray.config.schema import schema
from isoray.errors import UserError


@pytest.fixture(scope="module")
def toy_schema() -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).parent / "toy"))
    try:
        made = schema("toy_recipe:Toy")
    finally:
        sys.path.pop(0)
    Draft202012Validator.check_schema(made)
    return made


GOOD: list[dict[str, Any]] = [
    {"kind": "toy_recipe:Toy"},
    {"kind": "toy_recipe:Toy", "engine": "slow", "training": {"steps": 3}, "named": {"x": {}}},
    {"kind": "toy_recipe:Toy", "engine": {"kind": "slow", "patience": 3}},
    {"kind": "toy_recipe:Toy", "engine": {"kind": "mine:Engine", "anything": 3}},
    {"kind": "toy_recipe:Toy", "shape": {"radius": 2}},
    {"extends": "other.yaml", "engine": {"speed": 2}},
    {"kind": "toy_recipe:Toy", "search": {"training.steps": {"kind": "randint", "low": 1, "high": 3}}},
]
BAD: list[dict[str, Any]] = [
    {},
    {"kind": "toy_recipe:Toy", "trainin": {}},
    {"kind": "toy_recipe:Toy", "engine": "slwo"},
    {"kind": "toy_recipe:Toy", "engine": {"sped": 2}},
    {"kind": "toy_recipe:Toy", "training": {"steps": "ten"}},
    {"kind": "toy_recipe:Toy", "shape": {"kind": "circle", "side": 2}},
    {"kind": "toy_recipe:Toy", "search": {"training.steps": {"kind": "randit", "low": 1, "high": 3}}},
    {"extends": 3},
]


@pytest.mark.parametrize("document", GOOD)
def test_valid_files_pass(document: dict[str, Any], toy_schema: dict[str, Any]) -> None:
    assert [error.message for error in Draft202012Validator(toy_schema).iter_errors(document)] == []


@pytest.mark.parametrize("document", BAD)
def test_mistakes_are_found(document: dict[str, Any], toy_schema: dict[str, Any]) -> None:
    assert not Draft202012Validator(toy_schema).is_valid(document)


def test_docstrings_of_fields_are_the_help(toy_schema: dict[str, Any]) -> None:
    text = json.dumps(toy_schema)
    for docstring in ("Optimizer steps.", "How patient.", "How many wheels.", "Every random choice hangs on it."):
        assert docstring in text


def test_all_recipes_are_in_one_schema_that_every_stock_config_passes() -> None:
    made = schema()
    Draft202012Validator.check_schema(made)
    for path in stock_configs().values():
        Draft202012Validator(made).validate(read_document(path).value)


def test_an_unknown_recipe_is_a_user_error() -> None:
    with pytest.raises(UserError, match="'no_such' is no recipe"):
        schema("no_such")
    with pytest.raises(UserError, match="cannot be loaded"):
        schema("no_module_of_that_name:Toy")
