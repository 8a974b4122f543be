"""Read YAML strictly: YAML 1.2's scalars, no duplicate keys, no tags, and the line of every value.

PyYAML follows YAML 1.1, in which ``1e-5`` is a string, ``no`` a bool, ``1:30`` the number 90 and ``2024-01-01`` a date.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from isoray.errors import UserError

Dotted = tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A YAML value of JSON's types, and where each of its parts was written."""

    value: Any
    origins: dict[Dotted, str] = field(default_factory=dict)
    """Path of keys (and list positions, as text) -> ``file:line``."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq")}


def read_document(path: Path) -> Document:
    """The YAML (or JSON) file at ``path``. Raises UserError for what is no readable, strict YAML."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); expected a YAML config file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; expected a YAML config file") from error
    return parse(text, source=str(path))


def parse(text: str, *, source: str) -> Document:
    """The value of YAML ``text``; ``source`` names it in origins and errors."""
    origins: dict[Dotted, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = None if node is None else _construct(loader, node, (), origins, source, frozenset())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{source}{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise UserError(f"{source}: {' '.join(str(error).split())}") from error
    return Document(value, origins)


def _construct(
    loader: _Loader, node: yaml.Node, path: Dotted, origins: dict[Dotted, str], source: str, above: frozenset[int]
) -> Any:
    if id(node) in above:
        raise yaml.constructor.ConstructorError(None, None, "an alias inside its own anchor", node.start_mark)
    if node.tag not in _PLAIN_TAGS:
        raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag!r} is not allowed", node.start_mark)
    above = above | {id(node)}
    origins[path] = f"{source}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node)
            if key in result:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands here for the second time", key_node.start_mark
                )
            result[key] = _construct(loader, value_node, (*path, key), origins, source, above)
            origins[*path, key] = f"{source}:{key_node.start_mark.line + 1}"
        return result
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(loader, item, (*path, str(position)), origins, source, above)
            for position, item in enumerate(node.value)
        ]
    return _scalar(loader, node)


def _key(node: yaml.Node) -> str:
    """A key is its text: ``no: 1`` has the key 'no', ``1: x`` the key '1'."""
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "expected a plain word as key", node.start_mark)
    if node.value == "<<" and node.style is None:
        raise yaml.constructor.ConstructorError(
            None, None, "merge keys (<<) are not supported; expected `extends:`", node.start_mark
        )
    return str(node.value)


def _scalar(loader: _Loader, node: yaml.Node) -> Hashable:
    text = str(node.value)
    try:
        if node.tag.endswith(":int"):
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        value: Hashable = loader.construct_object(node)
    except (ValueError, KeyError) as error:
        kind = node.tag.rpartition(":")[2]
        raise yaml.constructor.ConstructorError(None, None, f"{text!r} is no {kind}", node.start_mark) from error
    return value
