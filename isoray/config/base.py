"""Config models, Components, and slots that find a Component by its ``kind``.

A *Config* is a frozen pydantic model that forbids unknown keys. A *Component* is a class with a nested ``Config`` whose
``kind`` is the name of the module it stands in. A *slot* is a config field that holds the Config of any Component of
one package: ``kind: lm`` in a slot of ``isoray.objectives`` imports ``isoray.objectives.lm`` and nothing else, and
``kind: my_package.my_module:MyClass`` reaches code outside. There is no registry.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializeAsAny,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from isoray.errors import UserError


class Config(BaseModel):
    """Base of every configuration model: frozen, unknown keys forbidden, field docstrings become the schema's help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_field_defaults(cls, value: Any) -> Any:
        """A mapping given for a field that has a Config as its default changes that default, key by key.

        So ``optimizer: {lr: 1.0e-3}`` keeps the field's default kind and settings; another ``kind`` starts afresh.
        """
        if not isinstance(value, Mapping):
            return value
        filled = dict(value)
        for name, field in cls.model_fields.items():
            default = default_config(field)
            if default is not None and name in filled:
                filled[name] = _on_top_of(default, filled[name])
        return filled

    def digest(self) -> str:
        """The first 12 hex digits of the SHA-256 of the resolved config as canonical JSON."""
        return digest_of(self.model_dump(mode="json"))


def default_config(field: FieldInfo) -> Config | None:
    """The Config that a field of a Config holds when nothing is given for it; None when its default is no Config."""
    if field.default_factory_takes_validated_data:
        return None
    default = field.get_default(call_default_factory=True)
    return default if isinstance(default, Config) else None


def _on_top_of(default: Config, given: object) -> object:
    kept: dict[str, Any] = default.model_dump(exclude_unset=True)
    kind = getattr(default, "kind", None)
    if kind is not None:
        kept["kind"] = kind
    return _merged(kept, given) if isinstance(given, Mapping) and same_kind(kept, given) else given


def _merged(kept: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(kept)
    for key, value in given.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and same_kind(old, value) else value
    return result


def same_kind(old: object, new: object) -> bool:
    """Whether the mapping ``new`` changes the mapping ``old`` rather than replacing it by another kind."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return False
    return bool(new.get("kind", old.get("kind")) == old.get("kind"))


def digest_of(value: object) -> str:
    """12 hex digits that identify a JSON-able value, whatever the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def close_to(name: str, choices: Iterable[str]) -> list[str]:
    """At most three of ``choices`` that ``name`` may have meant."""
    return difflib.get_close_matches(name, list(choices), n=3, cutoff=0.6)


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint that names the closest choices, or all of them: ``did you mean 'adam'?`` / ``one of: a, b``."""
    known = sorted(choices)
    close = close_to(name, known)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "one of: " + ", ".join(known) if known else "none is known here"


def missing_path(path: str | Path) -> str:
    """What to say of a path that does not exist: where it stops existing, and the nearest names there."""
    wanted = Path(path).absolute()
    parent = wanted
    while not parent.exists():
        wanted, parent = parent, parent.parent
    if not parent.is_dir():
        return f"{str(path)!r} does not exist: {parent} is a file"
    entries = [entry.name for entry in parent.iterdir() if entry.name[0] != "." or wanted.name[0] == "."]
    hint = nearest(wanted.name, entries) if len(entries) <= 20 or close_to(wanted.name, entries) else ""
    return f"{str(path)!r} does not exist: {parent} has no {wanted.name!r}" + (f"; {hint}" if entries and hint else "")


def hung_on(place: str, path: str, root: str) -> str:
    """``path`` hung on the folder ``root``. UserError, told by its ``place`` in the config, if it is not there; a URI
    is not looked at."""
    whole = path if "://" in path else str(Path(root) / path)
    if "://" not in whole and not Path(whole).exists():
        raise UserError(f"{place}: {missing_path(whole)}; it hangs on `root` ({root})")
    return whole


def _check_exists(path: str) -> str:
    if "://" not in path and not Path(path).exists():
        raise PydanticCustomError("path_missing", "{message}", {"message": missing_path(path)})
    return path


ExistingPath = Annotated[str, AfterValidator(_check_exists)]
"""The type of a config field that names a file or folder that must exist (or a URI, which is not looked at).

Relative paths hang on the current folder and stay as they are written, so that a config's digest is the same on every
machine; make them absolute before handing them to another process.
"""


class Component:
    """A class that is built from its nested ``Config``; its ``kind`` is the name of the module it stands in."""

    kind: ClassVar[str]

    class Config(Config):
        """Overridden by every component."""

        kind: str
        """Which component this is: its module's name, or ``package.module:Class`` for code outside isoray."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = cls.__module__.rpartition(".")[2]

    def __init__(self, config: Component.Config) -> None:
        self.config = config

    @classmethod
    def build(cls, config: Component.Config) -> Self:
        """The component that ``config`` describes (of whatever subclass owns that config)."""
        owner = component_of(type(config))
        if not issubclass(owner, cls):
            raise TypeError(f"{owner.__name__} is not a {cls.__name__}")
        return owner(config)


def component_of(config_class: type[Component.Config]) -> type[Any]:
    """The Component class in which ``config_class`` is nested."""
    owner: object = importlib.import_module(config_class.__module__)
    for name in config_class.__qualname__.split(".")[:-1]:
        owner = getattr(owner, name)
    return cast("type[Any]", owner)


def kinds(package: str) -> list[str]:
    """Names of the modules of ``package`` that hold a Component. Imports each: for schemas and error messages only."""
    folder = importlib.import_module(package)
    found = []
    for module in pkgutil.iter_modules(folder.__path__):
        if not module.name.startswith("_") and _component_in(f"{package}.{module.name}") is not None:
            found.append(module.name)
    return found


def find_component(package: str, kind: str) -> type[Component]:
    """The Component class named ``kind`` of ``package``, or of outside code for ``module:Class``.

    Raises LookupError with the nearest names when there is none.
    """
    if ":" in kind:
        module_name, _, class_name = kind.partition(":")
        if not all(part.isidentifier() for part in module_name.split(".")):
            raise LookupError(f"{kind!r} is not of the form package.module:Class")
        try:
            found = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise LookupError(f"{kind!r} cannot be loaded: {error}") from error
        if not (inspect.isclass(found) and issubclass(found, Component)):
            raise LookupError(f"{kind!r} is not a Component class")
        if inspect.isabstract(found):
            raise LookupError(f"{kind!r} is an abstract class: it lacks methods that its base demands")
        return found
    module_name = f"{package}.{kind}"
    if kind.isidentifier() and importlib.util.find_spec(module_name) is not None:
        component = _component_in(module_name)
        if component is not None:
            return component
    raise LookupError(f"{kind!r} is no kind of {package}: {nearest(kind, kinds(package))}")


def _component_in(module_name: str) -> type[Component] | None:
    module = importlib.import_module(module_name)
    for value in vars(module).values():
        here = inspect.isclass(value) and issubclass(value, Component) and value.__module__ == module_name
        if here and "Config" in vars(value) and not inspect.isabstract(value):
            return cast("type[Component]", value)
    return None


@dataclass(frozen=True)
class Slot:
    """Annotation of a config field that holds the Config of any Component of ``package``; see :func:`slot`."""

    package: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(
            self._resolve, core_schema.is_instance_schema(Component.Config), serialization=_dump_schema()
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        known = kinds(self.package)
        options: list[dict[str, Any]] = [{"enum": known}] if known else []
        for kind in known:
            config = find_component(self.package, kind).Config
            option = handler.resolve_ref_schema(handler(config.__pydantic_core_schema__))
            option["properties"]["kind"] |= {"const": kind}
            options.append(option)
        outside = {"kind": {"type": "string", "pattern": ":"}}
        options.append({"type": "object", "properties": outside, "required": ["kind"]})
        return {"anyOf": options, "description": f"a component of {self.package}, chosen by its kind"}

    def _resolve(self, value: object) -> Component.Config:
        if isinstance(value, Component.Config):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
            hint = ", ".join(kinds(self.package))
            raise PydanticCustomError("component", "expected a mapping with a `kind` (one of: {hint})", {"hint": hint})
        try:
            owner = find_component(self.package, value["kind"])
        except LookupError as error:
            raise PydanticCustomError("component", "{message}", {"message": str(error)}) from error
        return owner.Config.model_validate(dict(value))


def _dump_schema() -> core_schema.SerSchema:
    def dump(value: BaseModel, info: core_schema.SerializationInfo) -> dict[str, Any]:
        return value.model_dump(mode=cast("Any", info.mode))

    return core_schema.plain_serializer_function_ser_schema(dump, info_arg=True)


def slot(package: str) -> Any:
    """The type of a config field that holds any Component of ``package``: ``objective: slot("isoray.objectives")``."""
    return Annotated[SerializeAsAny[Component.Config], Slot(package)]
