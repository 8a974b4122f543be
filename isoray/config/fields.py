"""Which keys a config may have at a path, through nested models, slots and unions; errors of pydantic as lines."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from isoray.config.base import Slot, default_config, find_component, nearest
from isoray.config.document import Dotted


def keys_at(model: type[BaseModel], raw: Any, path: Dotted) -> set[str]:
    """The keys that the config of ``model``, given as the mapping ``raw``, may have at ``path``."""
    return {name for owner in _models_at(model, (), raw, path) for name in owner.model_fields}


def _models_at(annotation: Any, metadata: Sequence[Any], raw: Any, path: Dotted) -> list[type[BaseModel]]:
    """The models that may stand at ``path`` below a value ``raw`` of type ``annotation``.

    Of several the one that has the ``kind`` written in ``raw`` is taken.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _models_at(arguments[0], (*metadata, *arguments[1:]), raw, path)
    for slot in metadata:
        if isinstance(slot, Slot):
            return [below for model in _component_config(slot, raw) for below in _models_at(model, (), raw, path)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _models_below(annotation, raw, path)
    if origin in (Union, types.UnionType):
        kind = raw.get("kind") if isinstance(raw, Mapping) else None
        matching = [option for option in arguments if kind is not None and kind in _kinds_of(option)]
        return [below for option in matching or arguments for below in _models_at(option, (), raw, path)]
    if origin in (list, tuple, Sequence, dict, Mapping) and path:
        items = arguments[1:] if origin in (dict, Mapping) else arguments
        inner = _child(raw, path[0])
        return [below for item in items for below in _models_at(item, (), inner, path[1:])]
    return []


def _models_below(model: type[BaseModel], raw: Any, path: Dotted) -> list[type[BaseModel]]:
    if not path:
        return [model]
    field = model.model_fields.get(path[0])
    if field is None:
        return []
    value, default = _child(raw, path[0]), default_config(field)
    if default is not None and hasattr(default, "kind") and not (isinstance(value, Mapping) and "kind" in value):
        value = {**(value if isinstance(value, Mapping) else {}), "kind": default.kind}
    return _models_at(field.annotation, tuple(field.metadata), value, path[1:])


def _child(raw: Any, key: str) -> Any:
    if isinstance(raw, Mapping):
        return raw.get(key)
    if isinstance(raw, list) and key.isdigit() and int(key) < len(raw):
        return raw[int(key)]
    return None


def _component_config(slot: Slot, raw: Any) -> list[type[BaseModel]]:
    kind = raw.get("kind") if isinstance(raw, Mapping) else raw
    try:
        return [find_component(slot.package, kind).Config] if isinstance(kind, str) else []
    except LookupError:
        return []


def _kinds_of(option: Any) -> tuple[Any, ...]:
    if get_origin(option) is Annotated:
        option = get_args(option)[0]
    field = getattr(option, "model_fields", {}).get("kind")
    return () if field is None else get_args(field.annotation)


def problems(error: ValidationError, model: type[BaseModel], raw: Any) -> dict[Dotted, str]:
    """What is wrong with ``raw`` as a config of ``model``: path of keys -> one line, in the order of the file."""
    found: dict[Dotted, list[str]] = {}
    for detail in error.errors(include_url=False):
        path = written_path(raw, detail["loc"])
        line = _line(detail, lambda above: keys_at(model, raw, above), path)
        lines = found.setdefault(path, [])
        if line not in lines:
            lines.append(line)
    return {path: " or ".join(lines) for path, lines in found.items()}


def written_path(raw: Any, location: Iterable[str | int]) -> Dotted:
    """pydantic's location as it was written: without the names of union members, which nobody wrote, and with the name
    of an item where a mapping from names was taken as a list."""
    path: list[str] = []
    parts = list(location)
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if isinstance(raw, Mapping):
            if isinstance(part, int) and part not in raw and part < len(raw):
                part = list(raw)[part]
            if part not in raw and not last:
                continue
            raw = raw.get(part)
        elif isinstance(raw, list) and isinstance(part, int):
            raw = raw[part] if part < len(raw) else None
        else:
            continue
        path.append(str(part))
    return tuple(path)


def _line(detail: ErrorDetails, keys_of: Callable[[Dotted], set[str]], path: Dotted) -> str:
    kind, given, message = detail["type"], detail["input"], detail["msg"]
    if kind == "extra_forbidden":
        return f"unknown key; {nearest(path[-1], keys_of(path[:-1]))}"
    if kind == "missing":
        return "is required and missing"
    if kind in ("literal_error", "enum"):
        expected = str(detail["ctx"]["expected"])
        choices = [part.strip("'") for part in expected.replace(" or ", ", ").split(", ")]
        hint = nearest(str(given), choices)
        return f"expected {expected}, got {given!r:.80}" + (f"; {hint}" if hint.startswith("did") else "")
    if kind == "union_tag_invalid":
        expected = str(detail["ctx"]["expected_tags"])
        choices = [part.strip(" '") for part in expected.split(",")]
        return f"{detail['ctx']['tag']!r} is no kind of this; {nearest(str(detail['ctx']['tag']), choices)}"
    if kind == "union_tag_not_found":
        return f"expected a mapping with a {detail['ctx']['discriminator'].strip(chr(39))!r}"
    if message.startswith("Input should be "):
        return f"expected {message.removeprefix('Input should be ')}, got {given!r:.80}"
    return message.removeprefix("Value error, ")
