"""Puts a report together: reads a run's folder, asks the recipe's module for sections, renders one HTML file."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from isoray.errors import UserError
from isoray.report import numbers, svg


@dataclass(frozen=True)
class RunFiles:
    """What a report is made from: the parsed ``results.json`` and ``config.json`` of a run's folder."""

    folder: Path
    results: Mapping[str, Any]
    config: Mapping[str, Any] | None

    def table(self, name: str) -> list[dict[str, Any]]:
        """The rows of a table; empty when the run has not written it."""
        tables = self.results.get("tables")
        rows = tables.get(name) if isinstance(tables, dict) else None
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    @property
    def metrics(self) -> dict[str, Any]:
        found = self.results.get("metrics")
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Section:
    """A titled part of the page; ``anchor`` is its id in the navigation."""

    anchor: str
    title: str
    body: Markup


@dataclass(frozen=True)
class Content:
    """What a recipe's module returns: the title of the page, a line below it, facts as (name, value), and sections."""

    question: str
    about: Markup
    facts: Sequence[tuple[str, Markup | str]]
    sections: Sequence[Section]


def build(run_folder: Path) -> Path:
    """Writes ``run_folder/report.html`` atomically and returns its path.

    Raises UserError when the folder holds no ``results.json``, or one that is no JSON object.
    """
    run = read_run(run_folder)
    content = _content_maker(str(run.results.get("recipe", "")))(run)
    page = render(
        "page.html.j2",
        content=content,
        run=run,
        symbols=svg.marker_symbols(),
        identity=_identity(run),
        config_text=json.dumps(run.config, indent=2, ensure_ascii=False) if run.config is not None else None,
        results_text=json.dumps(run.metrics, indent=2, ensure_ascii=False) if run.metrics else None,
    )
    return _write(run.folder / "report.html", page)


def read_run(folder: Path) -> RunFiles:
    """The parsed files of a run's folder; see :func:`build` for the errors."""
    path = folder / "results.json"
    if not path.is_file():
        if not folder.is_dir():
            raise UserError(f"There is no run folder {folder}. Give the folder that `isoray run --out` wrote.")
        started = any((folder / name).exists() for name in ("config.json", "steps", "metrics.jsonl"))
        advice = (
            "The run has not finished; run the same command again and it goes on where it stopped."
            if started
            else "Give the folder that `isoray run --out` wrote; it holds config.json and results.json."
        )
        raise UserError(f"{folder} holds no results.json, which a report is made from. {advice}")
    results = _read_json(path)
    if not isinstance(results, dict) or "recipe" not in results:
        raise UserError(f"{path} holds no results of a run (a JSON object with a `recipe`). Run the recipe again.")
    config_path = folder / "config.json"
    config = _read_json(config_path) if config_path.is_file() else None
    return RunFiles(folder, results, config if isinstance(config, dict) else None)


def render(template: str, **context: object) -> Markup:
    """A template of this package, rendered with autoescape on."""
    return Markup(_environment().get_template(template).render(**context))


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). Run the recipe again to write it anew.") from error


def _content_maker(recipe: str) -> Callable[[RunFiles], Content]:
    # A recipe with a page of its own has a module of its name in this package; all others get the plain page.
    module = f"{__package__}.{recipe}"
    name = module if recipe.isidentifier() and importlib.util.find_spec(module) is not None else f"{__package__}.plain"
    found = getattr(importlib.import_module(name), "content", None)
    if found is None:
        found = importlib.import_module(f"{__package__}.plain").content
    return cast("Callable[[RunFiles], Content]", found)


def _identity(run: RunFiles) -> list[tuple[str, Markup | str]]:
    results = run.results
    facts: list[tuple[str, Markup | str]] = [("Recipe", str(results.get("recipe", "unknown")))]
    if results.get("config_digest"):
        facts.append(("Config digest", str(results["config_digest"])))
    if results.get("seed") is not None:
        facts.append(("Seed", str(results["seed"])))
    if results.get("started") is not None:
        facts.append(("Started", _when(results["started"])))
    if numbers.finite(results.get("seconds")) is not None:
        facts.append(("Took", numbers.duration(results["seconds"])))
    environment = results.get("environment")
    for name, value in environment.items() if isinstance(environment, dict) else ():
        facts.append((str(name), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return facts


def _when(started: object) -> str:
    if (seconds := numbers.finite(started)) is not None:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return str(started)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("isoray.report"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    made.globals.update(
        clip=svg.clip,
        num=numbers.num,
        count=numbers.count,
        duration=numbers.duration,
        brief=numbers.brief,
        plus_minus=numbers.plus_minus,
    )
    return made


def _write(path: Path, text: str) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".report-", suffix=".html")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
