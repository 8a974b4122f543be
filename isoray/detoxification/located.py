"""Paths that hang on a recipe's root, looked for before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from isoray.config.base import Component, hung_on
from isoray.detoxification.config import EvaluationConfig
from isoray.generation.prompts import TablePrompts
from isoray.models.config import ModelConfig
from isoray.models.locate import locate

Table = TypeVar("Table", bound=TablePrompts)


def check_models(models: Mapping[str, ModelConfig | str | None]) -> None:
    """UserError for a model, or the path of one, that is not there; told by its place in the config."""
    for place, model in models.items():
        path = model.path if isinstance(model, ModelConfig) else model
        if path is not None:
            locate(path, what=place)


def locate_tables(tables: Mapping[str, Table], section: str, root: str) -> dict[str, Table]:
    """``tables`` with their paths hung on ``root``. UserError for one that is not there."""
    return {
        name: table.model_copy(update={"path": hung_on(f"{section}.{name}.path", table.path, root)})
        if table.path is not None
        else table
        for name, table in tables.items()
    }


def locate_evaluation(evaluation: EvaluationConfig, root: str) -> EvaluationConfig:
    """``evaluation`` with the paths of prompts, questions and scorers hung on ``root``. UserError as above."""
    questions = evaluation.capability
    if questions is not None:
        path = hung_on("evaluation.capability.path", questions.path, root)
        questions = questions.model_copy(update={"path": path})
    return evaluation.model_copy(
        update={
            "prompts": locate_tables(evaluation.prompts, "evaluation.prompts", root),
            "capability": questions,
            "scorers": {name: _located_scorer(name, scorer, root) for name, scorer in evaluation.scorers.items()},
        }
    )


def _located_scorer(name: str, scorer: Component.Config, root: str) -> Component.Config:
    """The scorer with its files hung on ``root`` where they are there; what is not must be a hub id."""
    for field in ("path", "tokenizer"):
        path = getattr(scorer, field, None)
        if not isinstance(path, str):
            continue
        if (Path(root) / path).exists():
            scorer = scorer.model_copy(update={field: str(Path(root) / path)})
        elif scorer.kind == "detoxify" and field == "path":
            hung_on(f"evaluation.scorers.{name}.path", path, root)
        else:
            locate(path, what=f"the scorer {name!r}")
    return scorer
