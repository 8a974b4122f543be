"""Small charts as inline SVG, sized for small multiples: colours come from the page's style sheet, so that they follow
light and dark mode; every mark carries its exact numbers as a ``<title>``; every chart has a text for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from isoray.report.numbers import plain, short

WIDTH = 340
COLOURS = 8
SHAPES = 8
MAX_POINTS = 80


@dataclass(frozen=True)
class Style:
    """How one series looks in every chart of a page: a colour class and a marker of its own."""

    colour: str
    shape: int = 0


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A colour and a marker for each name; beyond eight names the colours repeat with other markers."""
    return {n: Style(f"s{i % COLOURS}", (i + i // COLOURS) % SHAPES) for i, n in enumerate(names)}


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
    """A line of a line panel; points are (x, y) with ascending x. ``name`` stands at the line's end if there is room."""

    style: Style
    name: str
    points: Sequence[tuple[float, float]]
    bold: bool = False


@dataclass
class _Scale:
    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ticks = log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high)

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, 1e-12)), math.log(low), math.log(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], roughly ``about`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with their doubles and halves where the range is short."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 200 else (1,)
    return [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]


def bar_panel(rows: Sequence[BarRow], *, label: str, low: float, high: float) -> Markup:
    """Horizontal bars from zero, rows in the order given; the same ``low`` and ``high`` make panels comparable."""
    left, room = _label_room([row.label for row in rows])
    top, height = 4, 26
    bottom = top + height * len(rows)
    x = _Scale(low, high, left, WIDTH - 8)
    parts = [_line(x(t), top, x(t), bottom, "zero" if t == 0 else "grid") for t in x.ticks]
    parts += [_text(x(t), bottom + 14, plain(t, 0 if t == int(t) else 1), "tick mid") for t in x.ticks]
    for index, row in enumerate(rows):
        middle = top + height * (index + 0.5)
        parts.append(_text(left - 8, middle + 4, clip(row.label, room), "label end", title=row.label))
        bars = [m for m in row.marks if not m.diamond]
        thick = min(12.0, (height - 8) / max(len(bars), 1))
        for position, mark in enumerate(bars):
            y = middle - thick * len(bars) / 2 + thick * position
            parts.append(_bar(mark, x, y, thick - 1))
        parts += [_shape(m.style, x(m.value), middle, m.title, "diamond") for m in row.marks if m.diamond]
    return _svg(bottom + 20, label, parts)


def _bar(mark: Mark, x: _Scale, y: float, thick: float) -> Markup:
    start, end = sorted((x(0), x(mark.value)))
    body = Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="1"/>').format(
        f"fill {mark.style.colour}", start, _r(y), _r(max(end - start, 0.8)), _r(thick)
    )
    if mark.sd:
        a, b, middle = x(mark.value - mark.sd), x(mark.value + mark.sd), _r(y + thick / 2)
        caps = f"M{a} {middle}H{b}M{a} {_r(y + 1)}V{_r(y + thick - 1)}M{b} {_r(y + 1)}V{_r(y + thick - 1)}"
        body += Markup('<path class="whisker" d="{}"/>').format(caps)
    return Markup("<g><title>{}</title>{}</g>").format(mark.title, body)


def scatter_panel(points: Sequence[Point], *, label: str, reach: float, x_name: str, y_name: str) -> Markup:
    """Dots in the square from -reach to reach, with the diagonal on which both sides agree."""
    size = 270.0
    x, y = _Scale(-reach, reach, 44, 44 + size), _Scale(-reach, reach, 6 + size, 6)
    parts = [_line(x(t), y(-reach), x(t), y(reach), "zero" if t == 0 else "grid") for t in x.ticks]
    parts += [_line(x(-reach), y(t), x(reach), y(t), "zero" if t == 0 else "grid") for t in y.ticks]
    parts.append(_line(x(-reach), y(-reach), x(reach), y(reach), "diagonal"))
    parts += [_text(x(t), 20 + size, plain(t, 0), "tick mid") for t in x.ticks]
    parts += [_text(38, y(t) + 4, plain(t, 0), "tick end") for t in y.ticks]
    parts += [_shape(p.style, x(p.x), y(p.y), p.title, "dot") for p in points]
    parts += [_text(44 + size / 2, 37 + size, x_name, "axis mid"), _side_text(13, 6 + size / 2, y_name)]
    return _svg(size + 42, label, parts)


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
    x = _Scale(min(steps), max(steps), 44, WIDTH - (margin + 8 if named else 8))
    if log:
        low, high = low / 1.05, high * 1.05
    elif span is None:
        # A flat line would otherwise be blown up to its rounding errors.
        slack = max(0.04 * (high - low), 1e-3 * max(abs(high), abs(low)), 1e-9)
        low, high = low - slack, high + slack
    y = _Scale(low, high, 6 + plot, 6, log)
    parts = [_line(x.start, y(t), x.end, y(t), "grid") for t in y.ticks]
    parts += [_text(39, y(t) + 4, short(t), "tick end") for t in y.ticks]
    ticks = nice_ticks(x.low, x.high, 4)
    parts += [_text(x(t), plot + 20, short(t), "tick mid") for t in ticks]
    parts += [_stroke(line, x, y) for line in lines]
    if named:
        parts += _end_names(lines, x, y, bottom=6 + plot, room=room)
    parts += [_text((x.start + x.end) / 2, plot + 36, x_name, "axis mid"), _side_text(10, 6 + plot / 2, y_name)]
    return _svg(plot + 41, label, parts)


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
    left, top, height, width = 128, 4, 30, 720
    bottom = top + height * len(rows)
    x = _Scale(-1, 1, left, width - 16)
    parts = [_line(x(t), top, x(t), bottom, "zero" if t == 0 else "grid") for t in x.ticks]
    parts += [_text(x(t), bottom + 15, plain(t, 1), "tick mid") for t in x.ticks]
    for index, (name, style, values, centre, spread) in enumerate(rows):
        middle = top + height * (index + 0.5)
        parts.append(_text(left - 12, middle + 4, clip(name, 18), "label end", title=name))
        for value, title in values:
            parts.append(
                Markup('<path class="tickmark {}" d="M{} {}v16"><title>{}</title></path>').format(
                    style.colour, x(value), _r(middle - 8), title
                )
            )
        if centre is not None:
            title = f"{name}: mean {centre:.4f}" + (f", sd over seeds {spread:.4f}" if spread is not None else "")
            if spread:
                a, b = x(max(-1, centre - spread)), x(min(1, centre + spread))
                parts.append(Markup('<path class="whisker wide" d="M{} {}H{}"/>').format(a, _r(middle), b))
            parts.append(_shape(style, x(centre), middle, title, "mean"))
    return _svg(bottom + 22, label, parts, width)


def legend(entries: Mapping[str, Style], *, dots: bool = False, diamond: str | None = None) -> Markup:
    """An HTML list of marker and name: bars, or ``dots``; ``diamond`` names the entry that is drawn as a diamond."""
    items = []
    for name, style in entries.items():
        if dots:
            key = _shape(style, 11, 7, "", "dot")
        elif name == diamond:
            key = _shape(style, 11, 7, "", "diamond")
        else:
            key = Markup('<rect class="fill {}" x="2" y="2" width="18" height="10" rx="1"/>').format(style.colour)
        swatch = Markup('<svg class="key" width="22" height="14" aria-hidden="true">{}</svg>').format(key)
        items.append(Markup("<li>{}{}</li>").format(swatch, name))
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def clip(text: str, length: int) -> str:
    """``text`` cut to ``length`` characters with an ellipsis, out of the middle so that both ends can be told apart."""
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}\u2026{text[len(text) - (length - 1 - head) :]}"


def _label_room(labels: Sequence[str]) -> tuple[int, int]:
    """Width in pixels, and capacity in characters, of a column for these labels."""
    longest = min(max((len(text) for text in labels), default=0), 19)
    return max(60, 18 + round(6.4 * longest)), max(longest, 6)


def _end_names(lines: Sequence[Line], x: _Scale, y: _Scale, *, bottom: float, room: int) -> list[Markup]:
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
        bend = f"M{at} {wanted}L{_r(x.end + 7)} {_r(place)}"
        parts.append(Markup('<path class="leader {}" d="{}"/>').format(line.style.colour, bend))
        parts.append(_shape(line.style, x.end + 11, place, "", "dot"))
        parts.append(_text(x.end + 19, place + 4, clip(line.name, room), "endname", title=line.name))
    return parts


def _stroke(line: Line, x: _Scale, y: _Scale) -> Markup:
    path = "M" + "L".join(f"{x(s)} {y(v)}" for s, v in line.points)
    last = line.points[-1]
    title = f"{line.name}: {short(line.points[0][1])} at first, {short(last[1])} at {short(last[0])}"
    weight = "stroke bold" if line.bold else "stroke"
    return Markup('<path class="{}" d="{}"><title>{}</title></path>').format(f"{weight} {line.style.colour}", path, title)


_SHAPES: tuple[Callable[[float], str], ...] = (
    lambda r: f"M{-r} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
    lambda r: f"M{-r} {-r}H{r}V{r}H{-r}z",
    lambda r: f"M0 {-r * 1.2:.1f}L{r * 1.1:.1f} {r * 0.9:.1f}H{-r * 1.1:.1f}z",
    lambda r: f"M0 {-r * 1.3:.1f}L{r * 1.3:.1f} 0L0 {r * 1.3:.1f}L{-r * 1.3:.1f} 0z",
    lambda r: f"M0 {r * 1.2:.1f}L{r * 1.1:.1f} {-r * 0.9:.1f}H{-r * 1.1:.1f}z",
    lambda r: f"M{-r * 0.4:.1f} {-r * 1.2:.1f}h{r * 0.8:.1f}v{r * 0.8:.1f}h{r * 0.8:.1f}v{r * 0.8:.1f}h{-r * 0.8:.1f}"
    f"v{r * 0.8:.1f}h{-r * 0.8:.1f}v{-r * 0.8:.1f}h{-r * 0.8:.1f}v{-r * 0.8:.1f}h{r * 0.8:.1f}z",
    lambda r: f"M0 {-r * 1.2:.1f}L{r * 1.2:.1f} {-r * 0.2:.1f}L{r * 0.8:.1f} {r:.1f}H{-r * 0.8:.1f}"
    f"L{-r * 1.2:.1f} {-r * 0.2:.1f}z",
    lambda r: f"M{-r * 1.3:.1f} {-r * 0.6:.1f}H{r * 1.3:.1f}V{r * 0.6:.1f}H{-r * 1.3:.1f}z",
)
_RADIUS = {"dot": 4, "diamond": 4.5, "mean": 6}


def marker_symbols() -> Markup:
    """Definitions of the markers, once per page; charts refer to them by id."""
    made = [
        Markup('<path id="{}{}" d="{}"/>').format(kind, i, draw(radius))
        for kind, radius in _RADIUS.items()
        for i, draw in enumerate(_SHAPES)
    ]
    return Markup('<svg width="0" height="0" class="defs" aria-hidden="true"><defs>{}</defs></svg>').format(
        Markup("").join(made)
    )


def _shape(style: Style, x: float, y: float, title: str, kind: str) -> Markup:
    shape = 3 if kind == "diamond" else style.shape
    inside = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<use class="mark {}" href="#{}{}" x="{}" y="{}">{}</use>').format(
        style.colour, kind, shape, _r(x), _r(y), inside
    )


def _svg(height: float, label: str, parts: Sequence[Markup], width: int = WIDTH) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, _r(height), label, Markup("").join(parts)
    )


def _text(x: float, y: float, text: str, classes: str, *, title: str = "") -> Markup:
    hover = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<text class="{}" x="{}" y="{}">{}{}</text>').format(classes, _r(x), _r(y), hover, text)


def _side_text(x: float, y: float, text: str) -> Markup:
    return Markup('<text class="axis mid" transform="translate({} {}) rotate(-90)">{}</text>').format(_r(x), _r(y), escape(text))


def _line(x1: float, y1: float, x2: float, y2: float, classes: str) -> Markup:
    return Markup('<path class="{}" d="M{} {}L{} {}"/>').format(classes, x1, y1, x2, y2)


def _r(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
