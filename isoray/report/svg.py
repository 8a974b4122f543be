"""The pieces that charts are drawn from: scales with round ticks, markers, texts, and the SVG element around them.

Coordinates are rounded to a tenth of a pixel; colours come from the page's style sheet by class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDTH = 340
COLOURS = 8


@dataclass(frozen=True)
class Style:
    """How one series looks in every chart of a page: a colour class and a marker of its own."""

    colour: str
    shape: int = 0


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A colour and a marker for each name; beyond eight names the colours repeat with other markers."""
    return {n: Style(f"s{i % COLOURS}", (i + i // COLOURS) % len(_SHAPES)) for i, n in enumerate(names)}


@dataclass
class Scale:
    """Maps values from [low, high] to pixels from ``start`` to ``end``, and knows its ticks."""

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


def clip(text: str, length: int) -> str:
    """``text`` cut to ``length`` characters with an ellipsis, out of the middle so that both ends can be told apart."""
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}\u2026{text[len(text) - (length - 1 - head) :]}"


_SHAPES: tuple[Callable[[float], str], ...] = (
    lambda r: f"M{-r} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
    lambda r: f"M{-r} {-r}H{r}V{r}H{-r}z",
    lambda r: f"M0 {-r * 1.2:.1f}L{r * 1.1:.1f} {r * 0.9:.1f}H{-r * 1.1:.1f}z",
    lambda r: f"M0 {-r * 1.3:.1f}L{r * 1.3:.1f} 0L0 {r * 1.3:.1f}L{-r * 1.3:.1f} 0z",
    lambda r: f"M0 {r * 1.2:.1f}L{r * 1.1:.1f} {-r * 0.9:.1f}H{-r * 1.1:.1f}z",
    lambda r: (
        f"M{-r * 0.4:.1f} {-r * 1.2:.1f}h{r * 0.8:.1f}v{r * 0.8:.1f}h{r * 0.8:.1f}v{r * 0.8:.1f}h{-r * 0.8:.1f}"
        f"v{r * 0.8:.1f}h{-r * 0.8:.1f}v{-r * 0.8:.1f}h{-r * 0.8:.1f}v{-r * 0.8:.1f}h{r * 0.8:.1f}z"
    ),
    lambda r: (
        f"M0 {-r * 1.2:.1f}L{r * 1.2:.1f} {-r * 0.2:.1f}L{r * 0.8:.1f} {r:.1f}H{-r * 0.8:.1f}"
        f"L{-r * 1.2:.1f} {-r * 0.2:.1f}z"
    ),
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


def shape(style: Style, x: float, y: float, title: str, kind: str) -> Markup:
    """A marker of the style's shape and colour at (x, y); ``kind`` is dot, mean or diamond."""
    shape = 3 if kind == "diamond" else style.shape
    inside = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<use class="mark {}" href="#{}{}" x="{}" y="{}">{}</use>').format(
        style.colour, kind, shape, rounded(x), rounded(y), inside
    )


def svg(height: float, label: str, parts: Sequence[Markup], width: int = WIDTH) -> Markup:
    """The SVG element, with a text for screen readers; it scales with the column that it stands in."""
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, rounded(height), label, Markup("").join(parts)
    )


def text(x: float, y: float, text: str, classes: str, *, title: str = "") -> Markup:
    """A text element; ``title`` shows on hover."""
    hover = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<text class="{}" x="{}" y="{}">{}{}</text>').format(classes, rounded(x), rounded(y), hover, text)


def side_text(x: float, y: float, text: str) -> Markup:
    """A text that runs upwards, for the name of a vertical axis."""
    return Markup('<text class="axis mid" transform="translate({} {}) rotate(-90)">{}</text>').format(
        rounded(x), rounded(y), text
    )


def rule(x1: float, y1: float, x2: float, y2: float, classes: str) -> Markup:
    """A straight line."""
    return Markup('<path class="{}" d="M{} {}L{} {}"/>').format(classes, x1, y1, x2, y2)


def rounded(value: float) -> str:
    """A coordinate to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
