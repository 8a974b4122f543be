"""JSON Schema of config files, for editors: every recipe with all kinds of its slots expanded."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from isoray.config.base import find_component, kinds, nearest
from isoray.config.load import RECIPES
from isoray.config.search import SEARCH
from isoray.errors import UserError

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(kind: str | None = None) -> dict[str, Any]:
    """JSON Schema of the config files of recipe ``kind``, or of all recipes.

    Keys are required only at the top and only in a file that extends none: a file that extends another may give any
    part of any mapping. That nothing is missing in the end is what loading checks. Raises UserError for an unknown kind.
    """
    if kind is not None and ":" not in kind and kind not in kinds(RECIPES):
        raise UserError(f"{kind!r} is no recipe: {nearest(kind, kinds(RECIPES))}")
    try:
        models = [find_component(RECIPES, name).Config for name in ([kind] if kind else kinds(RECIPES))]
    except LookupError as error:
        raise UserError(str(error)) from error
    references, definitions = models_json_schema([(model, "validation") for model in models])
    parts: dict[str, Any] = definitions.get("$defs", {})
    options = [references[model, "validation"] for model in models]
    tops = {option["$ref"].rpartition("/")[2] for option in options}
    dimensions = SEARCH.json_schema(ref_template="#/$defs/search.{model}")
    parts |= {f"search.{name}": part for name, part in dimensions.pop("$defs").items()}
    for name, part in parts.items():
        required = part.pop("required", [])
        if name in tops:
            part["properties"] |= {"extends": _EXTENDS, "search": {"description": _SEARCH, **dimensions}}
            part |= {"if": {"not": {"required": ["extends"]}}, "then": {"required": required}}
    return {"$schema": DIALECT, "title": "isoray config file", "anyOf": options, "$defs": _any_of(parts)}


def _any_of(part: Any) -> Any:
    """``oneOf`` as ``anyOf``: a mapping without its ``kind`` fits several members of a union."""
    if isinstance(part, dict):
        return {("anyOf" if key == "oneOf" else key): _any_of(value) for key, value in part.items()}
    return [_any_of(item) for item in part] if isinstance(part, list) else part


_EXTENDS = {"type": "string", "description": "A config file to start from: relative to this file, or a stock config."}
_SEARCH = "Dotted path -> the values it may take in a search."
