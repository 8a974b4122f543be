"""Findings for people: the texts of one method, sorted into a few groups, with what sets each apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isoray.evaluation.bootstrap import interval
from isoray.evaluation.clusters import cluster, contrastive_words, words_of
from isoray.exploration.control import Control
from isoray.exploration.explore import Found
from isoray.exploration.labels import Labelled

EXAMPLES = 3
"""Texts that are shown of each finding."""


@dataclass(frozen=True)
class Findings:
    """What is new, as groups of texts."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """The largest group first."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Texts of each, the most central first, with the contrast at every token."""
    finding_of: dict[int, int] = field(default_factory=dict)
    """Place of a text among all found -> its finding's number, from 1."""


def findings(
    found: Sequence[Found], labelled: Labelled, compared: Control, *, most: int, words: int, seed: int
) -> Findings:
    """The texts of the first method among ``found``, sorted into at most ``most`` groups."""
    if not found:
        return Findings()
    places = [place for place, one in enumerate(found) if one.method == found[0].method]
    texts = [found[place] for place in places]
    vectors_NH = np.stack([one.vector_H for one in texts if one.vector_H is not None])
    groups = cluster(vectors_NH, most=most, seed=seed)
    spoken = [words_of(one.pieces, one.contrast_T) for one in texts]
    set_apart = contrastive_words(spoken, groups.assignment_N, top=words)
    ordinary = np.array([one.log_ratio for one in compared.found])
    told = Findings()
    for number, members in enumerate(groups.members, start=1):
        ratios = np.array([texts[member].log_ratio for member in members])
        spread = interval(ratios, seed=seed)
        told.finding_of.update({places[member]: number for member in members})
        told.rows.append(
            {
                "finding": number,
                "texts": len(members),
                "share": len(members) / len(texts),
                "explorations": len({texts[member].seed for member in members}),
                "first": 1 + min(texts[member].number for member in members),
                "log_ratio": spread.estimate,
                "log_ratio_low": spread.low,
                "log_ratio_high": spread.high,
                "above_ordinary": float((ordinary < spread.estimate).mean()) if len(ordinary) else None,
                "words": [word for word, _ in set_apart[number - 1]],
                "domain": _most_common([labelled.domains[places[member]] for member in members]),
                "labels": {
                    name: _most_common([labels[places[member]].name for member in members])
                    for name, labels in labelled.labels.items()
                },
            }
        )
        told.examples.extend(_example(texts[member], number) for member in members[:EXAMPLES])
    return told


def _most_common(names: Sequence[str | None]) -> dict[str, Any]:
    name, count = Counter(names).most_common(1)[0]
    return {"name": name, "share": count / len(names)}


def _example(one: Found, number: int) -> dict[str, Any]:
    return {
        "finding": number,
        "method": one.method,
        "exploration": one.seed,
        "number": one.number + 1,
        "pieces": list(one.pieces),
        "contrast": [round(value, 3) for value in one.contrast_T.tolist()],
    }
