"""The detection variant: given examples ranked by how new they are, by the contrast and by simpler scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from isoray.config.base import digest_of, hung_on
from isoray.errors import DataError
from isoray.evaluation.novelty import auroc
from isoray.exploration.config import DetectionConfig
from isoray.exploration.explore import Explorer
from isoray.exploration.jobs import Detect
from isoray.generation.prompts import read_prompts

TOGETHER = 16
"""Examples that one job looks at."""
SCORES = ("contrast", "unlikely_to_base", "likely_to_tuned", "gradient_norm")
"""Mean log-ratio of the models (the paper's score, length-normalised); mean negative log-probability under the
pre-trained model; mean log-probability under the fine-tune; norm of the gradient under the pre-trained model. Which
likelihood and which gradient the paper compares with was not to be found out: these are our choice."""


def read_examples(config: DetectionConfig, *, seed: int) -> list[tuple[str, str]]:
    """``(kind, text)`` of all examples. UserError and DataError, with the kind, for tables that cannot be read."""
    found = []
    for name, table in config.examples.items():
        place = f"detection.examples.{name}"
        if table.path is not None:
            table = table.model_copy(update={"path": hung_on(f"{place}.path", table.path, config.root)})
        try:
            found += [(name, row["prompt"]) for row in read_prompts(table, seed=seed)]
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
    return found


def detect(explorer: Explorer, config: DetectionConfig, examples: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row for each score, over all new kinds and for each: how well it ranks new examples above the others."""
    jobs = []
    for begin in range(0, len(examples), TOGETHER):
        texts = tuple(text for _, text in examples[begin : begin + TOGETHER])
        jobs.append(Detect(f"detect-{digest_of([*texts, config.tokens])}", texts, config.tokens))
    records = explorer.phase("detection", jobs)
    columns: dict[str, list[float]] = {"tuned": [], "base": [], "gradient_norm": []}
    for job in jobs:
        for name, values in columns.items():
            values += records[job.key].result[name]
    tuned_N, base_N = np.array(columns["tuned"]), np.array(columns["base"])
    scores = dict(zip(SCORES, (tuned_N - base_N, -base_N, tuned_N, np.array(columns["gradient_norm"])), strict=True))
    kinds = [kind for kind, _ in examples]
    new = [kind for kind, table in config.examples.items() if table.new]
    familiar_N = np.array([kind not in new for kind in kinds])
    rows = []
    for name, score_N in scores.items():
        for of in [None, *new] if len(new) > 1 else [None]:
            is_new_N = np.array([kind in new if of is None else kind == of for kind in kinds])
            used_N = is_new_N | familiar_N
            found = auroc(is_new_N[used_N], score_N[used_N], seed=explorer.seed)
            row: dict[str, Any] = {"score": name, "of": of, **found._asdict()}
            rows.append(row | {"new": int(is_new_N.sum()), "familiar": int(familiar_N.sum())})
    return rows
