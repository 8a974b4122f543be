"""Small charts as inline SVG, sized for small multiples: colours come from the page's style sheet, so that they follow
light and dark mode; every mark carries its exact numbers as a ``<title>``; every chart has a text for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from isoray.report.numbers import plain, short
from isoray.report.svg import WIDTH, Scale, Style, clip, nice_ticks, rounded, rule, shape, side_text, svg, text

MAX_POINTS = 80


@dataclass(frozen=True)
class Mark:
    """One value in a row of a bar panel; ``sd`` draws a whisker of one standard deviation to each side."""

    style: Style
    value: float
    title: str
    sd: float | None = None
    diamond: bool = False


@dataclass(frozen=True)
class BarRow:
    """A labelled row of bars (and at most a few diamonds) of a bar panel."""

    label: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Point:
    """A dot of a scatter panel."""

    style: Style
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    """A line of a line panel; points are (x, y) with ascending x. ``name`` stands at its end if there is room."""

    style: Style
    name: str
    points: Sequence[tuple[float, float]]
    bold: bool = False


def bar_panel(rows: Sequence[BarRow], *, label: str, low: float, high: float) -> Markup:
    """Horizontal bars from zero, rows in the order given; the same ``low`` and ``high`` make panels comparable."""
    left, room = _label_room([row.label for row in rows])
    top, height = 4, 26
    bottom = top + height * len(rows)
    x = Scale(low, high, left, WIDTH - 8)
    parts = [rule(x(t), top, x(t), bottom, "zero" if t == 0 else "grid") for t in x.ticks]
    parts += [text(x(t), bottom + 14, plain(t, 0 if t == int(t) else 1), "tick mid") for t in x.ticks]
    for index, row in enumerate(rows):
        middle = top + height * (index + 0.5)
        parts.append(text(left - 8, middle + 4, clip(row.label, room), "label end", title=row.label))
        bars = [m for m in row.marks if not m.diamond]
        thick = min(12.0, (height - 8) / max(len(bars), 1))
        for position, mark in enumerate(bars):
            y = middle - thick * len(bars) / 2 + thick * position
            parts.append(_bar(mark, x, y, thick - 1))
        parts += [shape(m.style, x(m.value), middle, m.title, "diamond") for m in row.marks if m.diamond]
    return svg(bottom + 20, label, parts)


def _bar(mark: Mark, x: Scale, y: float, thick: float) -> Markup:
    start, end = sorted((x(0), x(mark.value)))
    body = Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="1"/>').format(
        f"fill {mark.style.colour}", start, rounded(y), rounded(max(end - start, 0.8)), rounded(thick)
    )
    if mark.sd:
        a, b, middle = x(mark.value - mark.sd), x(mark.value + mark.sd), rounded(y + thick / 2)
        cap = f"{rounded(y + 1)}V{rounded(y + thick - 1)}"
        body += Markup('<path class="whisker" d="{}"/>').format(f"M{a} {middle}H{b}M{a} {cap}M{b} {cap}")
    return Markup("<g><title>{}</title>{}</g>").format(mark.title, body)


def scatter_panel(points: Sequence[Point], *, label: str, reach: float, x_name: str, y_name: str) -> Markup:
    """Dots in the square from -reach to reach, with the diagonal on which both sides agree."""
    size = 270.0
    x, y = Scale(-reach, reach, 44, 44 + size), Scale(-reach, reach, 6 + size, 6)
    parts = [rule(x(t), y(-reach), x(t), y(reach), "zero" if t == 0 else "grid") for t in x.ticks]
    parts += [rule(x(-reach), y(t), x(reach), y(t), "zero" if t == 0 else "grid") for t in y.ticks]
    parts.append(rule(x(-reach), y(-reach), x(reach), y(reach), "diagonal"))
    parts += [text(x(t), 20 + size, plain(t, 0), "tick mid") for t in x.ticks]
    parts += [text(38, y(t) + 4, plain(t, 0), "tick end") for t in y.ticks]
    parts += [shape(p.style, x(p.x), y(p.y), p.title, "dot") for p in points]
    parts += [text(44 + size / 2, 37 + size, x_name, "axis mid"), side_text(13, 6 + size / 2, y_name)]
    return svg(size + 42, label, parts)


def line_panel(
    lines: Sequence[Line],
    *,
    label: str,
    x_name: str,
    y_name: str,
    span: tuple[float, float] | None = None,
    end_labels: bool = True,
) -> Markup:
    """Lines over a common x, each named at its end. The y axis covers ``span``, or else the values, on a logarithmic
    scale when they differ by more than a factor of 12.
    """
    values = [v for line in lines for _, v in line.points]
    steps = [s for line in lines for s, _ in line.points]
    low, high = span or (min(values), max(values))
    log = span is None and low > 0 and high / low > 12
    named = end_labels and len(lines) <= 14
    plot = 190 if not named else max(190, 13 * len(lines) + 10)
    margin, room = _label_room([line.name for line in lines])
    x = Scale(min(steps), max(steps), 44, WIDTH - (margin + 8 if named else 8))
    if log:
        low, high = low / 1.05, high * 1.05
    elif span is None:
        # A flat line would otherwise be blown up to its rounding errors.
        slack = max(0.04 * (high - low), 1e-3 * max(abs(high), abs(low)), 1e-9)
        low, high = low - slack, high + slack
    y = Scale(low, high, 6 + plot, 6, log)
    parts = [rule(x.start, y(t), x.end, y(t), "grid") for t in y.ticks]
    parts += [text(39, y(t) + 4, short(t), "tick end") for t in y.ticks]
    ticks = nice_ticks(x.low, x.high, 4)
    parts += [text(x(t), plot + 20, short(t), "tick mid") for t in ticks]
    parts += [_stroke(line, x, y) for line in lines]
    if named:
        parts += _end_names(lines, x, y, bottom=6 + plot, room=room)
    parts += [text((x.start + x.end) / 2, plot + 36, x_name, "axis mid")]
    if y_name:
        parts.append(side_text(10, 6 + plot / 2, y_name))
    return svg(plot + 41, label, parts)


def thin(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most ``limit`` points: means of equal runs of neighbours, the x at the end of each run."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / limit)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(run[-1][0], math.fsum(v for _, v in run) / len(run)) for run in runs]


def strip_panel(
    rows: Sequence[tuple[str, Style, Sequence[tuple[float, str]], float | None, float | None]], *, label: str
) -> Markup:
    """Rows (name, style, [(value, title)], mean, sd) on an axis from -1 to 1: one tick a value, a dot at the mean."""
    left, top, height, width = 108, 4, 26, 440
    bottom = top + height * len(rows)
    x = Scale(-1, 1, left, width - 12)
    parts = [rule(x(t), top, x(t), bottom, "zero" if t == 0 else "grid") for t in x.ticks]
    parts += [text(x(t), bottom + 15, plain(t, 1), "tick mid") for t in x.ticks]
    for index, (name, style, values, centre, spread) in enumerate(rows):
        middle = top + height * (index + 0.5)
        parts.append(text(left - 12, middle + 4, clip(name, 15), "label end", title=name))
        for value, title in values:
            parts.append(
                Markup('<path class="tickmark {}" d="M{} {}v16"><title>{}</title></path>').format(
                    style.colour, x(value), rounded(middle - 8), title
                )
            )
        if centre is not None:
            title = f"{name}: mean {centre:.4f}" + (f", sd over seeds {spread:.4f}" if spread is not None else "")
            if spread:
                a, b = x(max(-1, centre - spread)), x(min(1, centre + spread))
                parts.append(Markup('<path class="whisker wide" d="M{} {}H{}"/>').format(a, rounded(middle), b))
            parts.append(shape(style, x(centre), middle, title, "mean"))
    return svg(bottom + 22, label, parts, width)


def legend(entries: Mapping[str, Style], *, dots: bool = False, diamond: str | None = None) -> Markup:
    """An HTML list of marker and name: bars, or ``dots``; ``diamond`` names the entry that is drawn as a diamond."""
    items = []
    for name, style in entries.items():
        if dots:
            key = shape(style, 11, 7, "", "dot")
        elif name == diamond:
            key = shape(style, 11, 7, "", "diamond")
        else:
            key = Markup('<rect class="fill {}" x="2" y="2" width="18" height="10" rx="1"/>').format(style.colour)
        swatch = Markup('<svg class="key" width="22" height="14" aria-hidden="true">{}</svg>').format(key)
        items.append(Markup("<li>{}{}</li>").format(swatch, name))
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def _label_room(labels: Sequence[str]) -> tuple[int, int]:
    """Width in pixels, and capacity in characters, of a column for these labels."""
    longest = min(max((len(text) for text in labels), default=0), 19)
    return max(60, 18 + round(6.4 * longest)), max(longest, 6)


def _end_names(lines: Sequence[Line], x: Scale, y: Scale, *, bottom: float, room: int) -> list[Markup]:
    gap = 13.0
    ends = sorted((y(line.points[-1][1]), i) for i, line in enumerate(lines) if line.points)
    places: list[float] = []
    for wanted, _ in ends:
        places.append(max(wanted, places[-1] + gap) if places else wanted)
    limit = bottom
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    parts = []
    for place, (wanted, index) in zip(places, ends, strict=True):
        line = lines[index]
        at = x(line.points[-1][0])
        bend = f"M{at} {wanted}L{rounded(x.end + 7)} {rounded(place)}"
        parts.append(Markup('<path class="leader {}" d="{}"/>').format(line.style.colour, bend))
        parts.append(shape(line.style, x.end + 11, place, "", "dot"))
        parts.append(text(x.end + 19, place + 4, clip(line.name, room), "endname", title=line.name))
    return parts


def _stroke(line: Line, x: Scale, y: Scale) -> Markup:
    path = "M" + "L".join(f"{x(s)} {y(v)}" for s, v in line.points)
    last = line.points[-1]
    title = f"{line.name}: {short(line.points[0][1])} at first, {short(last[1])} at {short(last[0])}"
    weight = "stroke bold" if line.bold else "stroke"
    return Markup('<path class="{}" d="{}"><title>{}</title></path>').format(
        f"{weight} {line.style.colour}", path, title
    )
