"""The curves of an exploration: how many of the known domains were found, text by text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from isoray.report.cge.results import Exploration, label
from isoray.report.numbers import finite, plain
from isoray.report.svg import Scale, Style, clip, nice_ticks, rounded, rule, shape, side_text, svg, text

ACROSS, PLOT, MARGIN = 560, 240, 130
"""Width of the curves' chart, height of its plot, and room for the names at the lines' ends."""


@dataclass(frozen=True)
class Curve:
    """Domains that a method has found after 0, 1, 2, ... texts: mean, fewest and most over its explorations."""

    method: str
    style: Style
    mean: list[float]
    low: list[float]
    high: list[float]

    @property
    def told(self) -> str:
        """Its end in words."""
        end = f"{label(self.method)} {plain(self.mean[-1], 1)} after {len(self.mean) - 1} texts"
        if self.low[-1] == self.high[-1]:
            return end
        return f"{end} ({plain(self.low[-1], 0)} to {plain(self.high[-1], 0)})"


def curves(explored: Exploration) -> list[Curve]:
    """A curve for each method. An exploration of fewer texts than others keeps what it found."""
    held: dict[str, dict[Any, dict[int, float]]] = {}
    for row in explored.curves:
        number, coverage = finite(row.get("number")), finite(row.get("coverage"))
        if number is not None and coverage is not None and row.get("method") in explored.methods:
            each = held.setdefault(str(row["method"]), {}).setdefault(row.get("exploration"), {})
            each[int(number)] = coverage * len(explored.domains)
    found = []
    for method, explorations in held.items():
        last = max(max(each) for each in explorations.values())
        filled = list(zip(*(_filled(each, last) for each in explorations.values()), strict=True))
        means = [sum(values) / len(values) for values in filled]
        found.append(Curve(method, explored.styles[method], means, [min(v) for v in filled], [max(v) for v in filled]))
    return found


def _filled(each: Mapping[int, float], last: int) -> list[float]:
    values = [0.0]
    for number in range(1, last + 1):
        values.append(each.get(number, values[-1]))
    return values


def curve_panel(explored: Exploration) -> Markup | None:
    """Domains found against texts, a line for each method with the band of its explorations; None without any."""
    found = curves(explored)
    if not found or not explored.domains:
        return None
    most = len(explored.domains)
    x = Scale(0, max(len(curve.mean) - 1 for curve in found), 44, ACROSS - MARGIN)
    y = Scale(0, most * 1.03, 8 + PLOT, 8)
    heights = [t for t in nice_ticks(0, most) if t == int(t)]
    parts = [rule(x.start, y(t), x.end, y(t), "grid") for t in heights]
    parts += [rule(x.start, y(most), x.end, y(most), "diagonal")]
    parts += [text(38, y(t) + 4, plain(t, 0), "tick end") for t in heights]
    parts += [text(x(t), PLOT + 23, plain(t, 0), "tick mid") for t in nice_ticks(0, x.high, 6) if t == int(t)]
    parts += [_band(curve, x, y) for curve in found if curve.low != curve.high]
    parts += [_line(curve, x, y) for curve in reversed(found)]
    parts += _end_names(found, x, y)
    parts += [text((x.start + x.end) / 2, PLOT + 40, "texts drawn", "axis mid")]
    parts += [side_text(12, 8 + PLOT / 2, "known domains found")]
    told = "; ".join(curve.told for curve in found)
    return svg(PLOT + 46, f"Known domains found, of {most}, as texts are drawn: {told}", parts, ACROSS)


def _steps(values: Sequence[float], x: Scale, y: Scale) -> list[tuple[float, float]]:
    """The corners of a line that stays level until the next text."""
    corners = [(x(0), y(values[0]))]
    for number, value in enumerate(values[1:], start=1):
        if y(value) != corners[-1][1]:
            corners += [(x(number), corners[-1][1]), (x(number), y(value))]
    return [*corners, (x(len(values) - 1), corners[-1][1])]


def _path(corners: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{rounded(a)} {rounded(b)}" for a, b in corners)


def _band(curve: Curve, x: Scale, y: Scale) -> Markup:
    outline = [*_steps(curve.high, x, y), *reversed(_steps(curve.low, x, y))]
    return Markup('<path class="band {}" d="{}z"/>').format(curve.style.colour, _path(outline))


def _line(curve: Curve, x: Scale, y: Scale) -> Markup:
    weight = "stroke bold" if curve.style.colour == "ours" else "stroke"
    return Markup('<path class="{} {}" d="{}"><title>{}</title></path>').format(
        weight, curve.style.colour, _path(_steps(curve.mean, x, y)), curve.told
    )


def _end_names(found: Sequence[Curve], x: Scale, y: Scale) -> list[Markup]:
    """Each line's marker and name beside its end, clear of the others, from the bottom upwards."""
    parts, limit = list[Markup](), y.start
    for curve in sorted(found, key=lambda c: c.mean[-1]):
        end = x(len(curve.mean) - 1), y(curve.mean[-1])
        place = min(end[1], limit)
        limit = place - 15
        bend = f"M{rounded(end[0])} {rounded(end[1])}L{rounded(x.end + 9)} {rounded(place)}"
        parts.append(Markup('<path class="leader {}" d="{}"/>').format(curve.style.colour, bend))
        parts.append(shape(curve.style, x.end + 14, place, "", "dot"))
        parts.append(text(x.end + 23, place + 4, clip(label(curve.method), 19), "endname", title=curve.told))
    return parts
