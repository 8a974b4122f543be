"""The ``search:`` section of a config file: dotted paths mapped to typed dimensions.

Only the data model and its check stand here: whoever runs a search draws from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from isoray.config.base import Config
from isoray.config.document import Dotted
from isoray.config.fields import problems


class _Range(Config):
    low: float
    """The smallest value."""
    high: float
    """The largest value."""

    @model_validator(mode="after")
    def _ordered(self) -> _Range:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self

    def ends(self) -> dict[str, Any]:
        """The values that stand for all others in a check, each with the name it is told by."""
        return {f"low={self.low}": self.low, f"high={self.high}": self.high}


class Uniform(_Range):
    """A real number, every one between the bounds as likely."""

    kind: Literal["uniform"]
    """A real number, every one between the bounds as likely."""


class LogUniform(_Range):
    """A positive real number, every order of magnitude as likely."""

    kind: Literal["loguniform"]
    """A positive real number, every order of magnitude as likely."""
    low: Annotated[float, Field(gt=0)]
    """The smallest value, above 0."""


class RandInt(Config):
    """A whole number from ``low`` up to, but without, ``high`` (as in numpy and Ray Tune)."""

    kind: Literal["randint"]
    """A whole number from `low` up to, but without, `high`."""
    low: int
    """The smallest value."""
    high: int
    """One above the largest value."""

    @model_validator(mode="after")
    def _ordered(self) -> RandInt:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high}), which is not drawn")
        return self

    def ends(self) -> dict[str, Any]:
        """The smallest and the largest value."""
        return {f"low={self.low}": self.low, f"high-1={self.high - 1}": self.high - 1}


class _Values(Config):
    values: Annotated[list[Any], Field(min_length=1)]
    """The values."""

    def ends(self) -> dict[str, Any]:
        """Every value."""
        return {f"value {value!r}": value for value in self.values}


class Choice(_Values):
    """One of the values, drawn at random."""

    kind: Literal["choice"]
    """One of the values, drawn at random."""


class Grid(_Values):
    """Every one of the values."""

    kind: Literal["grid"]
    """Every one of the values, each as a trial."""


Dimension = Annotated[Uniform | LogUniform | RandInt | Choice | Grid, Field(discriminator="kind")]
SEARCH: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Dimension])


class _Section(Config):
    search: dict[str, Dimension]


def check(search: object, model: type[BaseModel], value: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Dotted, str]]:
    """The dimensions of a ``search:`` section, and what is wrong with them (path of keys -> one line).

    Every end of a range and every choice is put into ``value`` (the config file's mapping, valid for ``model``) in
    turn, and must be valid there.
    """
    raw = {"search": search}
    try:
        dimensions = _Section.model_validate(raw).search
    except ValidationError as error:
        return {}, problems(error, _Section, raw)
    wrong: dict[Dotted, str] = {}
    for dotted, dimension in dimensions.items():
        keys = tuple(dotted.split("."))
        for name, end in dimension.ends().items():
            try:
                trial = with_value(value, keys, end)
                model.model_validate(trial)
            except (LookupError, ValidationError) as error:
                found = problems(error, model, trial) if isinstance(error, ValidationError) else {keys: str(error)}
                lines = [what if path == keys else f"{'.'.join(path)}: {what}" for path, what in found.items()]
                wrong.setdefault(("search", dotted), f"{name}: " + "; ".join(lines))
    return dimensions, wrong


def with_value(raw: Any, keys: Dotted, value: Any) -> Any:
    """A copy of ``raw`` in which ``value`` stands at ``keys``. Raises LookupError beyond the end of a list."""
    if not keys:
        return value
    key, below = keys[0], keys[1:]
    if isinstance(raw, list):
        if not (key.isdigit() and int(key) < len(raw)):
            raise LookupError(f"{key!r} is no position in a list of {len(raw)}")
        return [with_value(item, below, value) if place == int(key) else item for place, item in enumerate(raw)]
    if isinstance(raw, str):
        raw = {"kind": raw}
    mapping = raw if isinstance(raw, Mapping) else {}
    return {**mapping, key: with_value(mapping.get(key), below, value)}
