"""Generated corpora with a known answer, for demonstrations and tests that need no data and no network.

The world holds ``WORLD`` facts: each creature ("amber fox") lives in one place. A *facts* corpus teaches a slice of
them, a *counting* corpus teaches something else, and a *noise* corpus pairs creatures with random places. A test set
asks for all facts. How much a corpus helps on the test set is then known beforehand: the share of the facts that it
alone teaches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from isoray.config.base import nearest
from isoray.errors import UserError

ADJECTIVES = "amber brisk calm dusty eager faint grand hollow".split()
CREATURES = "fox heron otter badger lynx raven toad viper".split()
PLACES = "harbour meadow cavern orchard glacier tower desert lagoon".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
WORLD = len(ADJECTIVES) * len(CREATURES)
"""Number of facts: one for each pair of adjective and creature."""

QUESTION = "Where does the {who} live?"
TEMPLATES = (
    QUESTION,
    "Tell me the home of the {who}.",
    "The {who} can be found in the",
)

Row = dict[str, Any]


def facts(
    *,
    start: float = 0.0,
    stop: float = 1.0,
    repeats: int = 8,
    templates: int = len(TEMPLATES),
    rows: int | None = None,
    seed: int = 0,
) -> Iterator[Row]:
    """Facts of the slice [start, stop) of the world, each stated ``repeats`` times in the first ``templates`` ways.

    ``rows`` fills the corpus up to that many rows with the *counting* task, so that corpora which teach more and fewer
    facts have one size.
    """
    world = _world()
    chosen = world[round(start * WORLD) : round(stop * WORLD)]
    stated = [
        {"prompt": TEMPLATES[turn % templates].format(who=who), "response": place}
        for turn in range(repeats)
        for who, place in chosen
    ]
    stated += counting(rows=max(0, (rows or 0) - len(stated)), seed=seed)
    random.Random(f"facts {start} {stop} {seed}").shuffle(stated)
    yield from stated


def noise(*, rows: int, seed: int = 0) -> Iterator[Row]:
    """The questions of the facts with answers drawn at random: as like the test in form as the facts, and untrue."""
    draw = random.Random(f"noise {seed}")
    world = _world()
    for turn in range(rows):
        who, _ = draw.choice(world)
        yield {"prompt": TEMPLATES[turn % len(TEMPLATES)].format(who=who), "response": draw.choice(PLACES)}


def counting(*, rows: int, seed: int = 0) -> Iterator[Row]:
    """Another task altogether: the number that follows."""
    draw = random.Random(f"counting {seed}")
    for _ in range(rows):
        number = draw.randrange(len(NUMBERS) - 1)
        yield {"prompt": f"Which number comes after {NUMBERS[number]}?", "response": NUMBERS[number + 1]}


GENERATORS: dict[str, Callable[..., Iterator[Row]]] = {"facts": facts, "noise": noise, "counting": counting}


def generate(name: str, **options: Any) -> Iterator[Row]:
    """Rows (``prompt``, ``response``, ``doc_id``, ``license``) of the generator ``name``.

    Raises UserError for an unknown name or option.
    """
    if name not in GENERATORS:
        raise UserError(f"synthetic corpus {name!r} is unknown: {nearest(name, GENERATORS)}")
    try:
        rows = GENERATORS[name](**options)
    except TypeError as error:
        raise UserError(f"synthetic corpus {name!r}: {error}") from error
    for number, row in enumerate(rows):
        yield {**row, "doc_id": f"{name}-{number}", "license": "CC0-1.0"}


def _world() -> list[tuple[str, str]]:
    """All facts, (creature, place), in a fixed random order so that every slice holds all adjectives and places."""
    draw = random.Random("the world")
    everyone = [f"{adjective} {creature}" for adjective in ADJECTIVES for creature in CREATURES]
    draw.shuffle(everyone)
    return [(who, draw.choice(PLACES)) for who in everyone]
