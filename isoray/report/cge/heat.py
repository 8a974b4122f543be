"""Heat maps of the contrast over the tokens of a text, and texts in which no character hides.

The colour of a token diverges around zero: its strength grows with the contrast's size, up to a reach that all texts of
a page share. So that it can be read without colour, too, a line grows with it, which runs below the token, or above it
where the contrast is below zero.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from isoray.report.numbers import finite, mean, signed

LEAST_REACH = 1.0
"""Nats: contrasts that are all smaller do not get the strongest colour, however they compare with each other."""
CLIPPED = 0.05
"""Share of the tokens whose contrast is beyond the reach, so that a single one does not pale all others."""
NOTHING = "\u25ab"
"""Stands for a token that adds no character to the text."""
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of characters that show nothing by themselves, or cannot be written at all."""
LONG = 240
"""Characters of a text that are shown before its rest is folded away."""


def visible(text: str) -> str:
    """``text`` with characters that would hide, or turn the text around them, told by their code point; a sign stands
    before each line break, and for each tab."""
    return "".join(map(_visible, text.replace("\r\n", "\n")))


def _visible(character: str) -> str:
    if character == "\n":
        return "\u21b5\n"
    if character == "\t":
        return "\u21e5\t"
    # The joiners of Persian, of Indian scripts and of emoji belong to the script.
    if unicodedata.category(character) in HIDDEN and character not in "\u200c\u200d":
        return f"\u27e8U+{ord(character):04X}\u27e9"
    return character


def reach(texts: Iterable[Sequence[object]]) -> float:
    """The contrast that gets the strongest colour, given those of all texts, in nats."""
    sizes = sorted(abs(known) for contrast in texts for value in contrast if (known := finite(value)) is not None)
    if not sizes:
        return LEAST_REACH
    return max(LEAST_REACH, sizes[min(len(sizes) - 1, int((1 - CLIPPED) * len(sizes)))])


def strength(contrast: float, reach: float) -> int:
    """Of a token's colour, in percent; the same for a contrast and its negative."""
    return round(100 * min(1.0, abs(contrast) / reach))


@dataclass(frozen=True)
class Token:
    """A piece of a text and its contrasts: of several tokens where the first of them add no character."""

    piece: str
    contrasts: list[float]

    def html(self, reach: float) -> Markup:
        """The piece in its colour; its contrast is the title."""
        if not self.contrasts:
            return Markup('<span title="not measured">{}</span>').format(self.piece)
        value = mean(self.contrasts) or 0.0
        told = f"{signed(value, 2)} nats"
        if len(self.contrasts) > 1:
            told += f", mean of {len(self.contrasts)} tokens"
        return Markup('<span class="{}" style="--v:{}" title="{}">{}</span>').format(
            "more" if value >= 0 else "less", strength(value, reach), told, self.piece
        )


def tokens(row: Mapping[str, Any]) -> Iterator[Token]:
    """The pieces of an example with their contrasts. A token that adds no character goes with the one that does."""
    pieces, contrast = row.get("pieces") or [], row.get("contrast")
    contrast = contrast if isinstance(contrast, list) else []
    held: list[float] = []
    open_ = False
    for place, piece in enumerate(pieces):
        known = finite(contrast[place]) if place < len(contrast) else None
        held += [] if known is None else [known]
        open_ = piece == ""
        if not open_:
            yield Token(visible(str(piece)), held)
            held = []
    if open_:
        yield Token(NOTHING, held)


def example(row: Mapping[str, Any], reach: float) -> dict[str, Any]:
    """A text as a heat map, with what is said of it."""
    contrast = row.get("contrast")
    known = [v for one in (contrast if isinstance(contrast, list) else []) if (v := finite(one)) is not None]
    exploration = finite(row.get("exploration"))
    return {
        "number": row.get("number"),
        "exploration": None if exploration is None else int(exploration) + 1,
        "count": len(row.get("pieces") or []),
        "mean": mean(known),
        "map": Markup("").join(token.html(reach) for token in tokens(row)),
    }


def scale(reach: float) -> list[tuple[str, Markup]]:
    """The legend: some contrasts in their colours."""
    steps = [("less", -1.0), ("less", -0.5), ("more", 0.0), ("more", 0.5), ("more", 1.0)]
    return [
        (
            signed(share * reach, 1) if share else "0",
            Markup('<span class="{}" style="--v:{}">token</span>').format(side, strength(share * reach, reach)),
        )
        for side, share in steps
    ]


def clipped(text: str) -> dict[str, Any]:
    """A text, and what is shown of a long one at first."""
    text = visible(text.strip())
    if len(text) <= LONG:
        return {"text": text, "start": None}
    return {"text": text, "start": text[:LONG].rsplit(" ", 1)[0] + " \u2026"}


def told(value: float | None) -> str:
    """A contrast in words."""
    return "not measured" if value is None else f"{signed(value, 2)} nats a token"
