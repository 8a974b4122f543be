"""Templates of this package, beside those that all reports share."""

from __future__ import annotations

from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from isoray.report import numbers, svg


def render(template: str, **context: object) -> Markup:
    """A template, rendered with autoescape on."""
    return Markup(_environment().get_template(template).render(**context))


@cache
def _environment() -> Environment:
    made = Environment(
        loader=ChoiceLoader([PackageLoader("isoray.report.cge"), PackageLoader("isoray.report")]),
        autoescape=True,
        undefined=StrictUndefined,
    )
    made.globals.update(
        clip=svg.clip, num=numbers.num, count=numbers.count, duration=numbers.duration, brief=numbers.brief
    )
    return made
