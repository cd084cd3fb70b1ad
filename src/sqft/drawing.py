"""Charts as SVG, for the report's page and a search's folder: no script, no image files, every text escaped. What has
colour k has the class ``ck``; the colours are the page's, so that charts follow its theme."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

COLOURS = 8  # later ones start again
LETTER = 8.0  # mean width of a letter of the charts' 12.5-pixel text, in a wide system font
PALETTE = {  # name: (in light, in dark)
    "panel": ("#ffffff", "#171b21"), "ink": ("#15191f", "#e9ecf1"), "soft": ("#545c68", "#a5aebb"),
    "grid": ("#e8ebef", "#262c34"), "c0": ("#1d5fc4", "#6aa5ff"), "c1": ("#c2570c", "#ff9d52"),
    "c2": ("#12805c", "#4fd0a0"), "c3": ("#7a3fb8", "#c39bff"), "c4": ("#b3245f", "#ff86b3"),
    "c5": ("#0d7a8c", "#4fc9dc"), "c6": ("#7d6408", "#dcbf4a"), "c7": ("#7d8794", "#8b95a3"),
}  # fmt: skip
STYLE = """svg text { fill: var(--ink); font-size: 12.5px; font-family: inherit; }
svg .tick, svg .label { fill: var(--soft); } svg .label, svg .name { font-weight: 600; }
svg .name { paint-order: stroke; stroke: var(--panel); stroke-width: 3px; stroke-linejoin: round; }
.grid { stroke: var(--grid); } .axis, .leader { stroke: var(--soft); fill: none; } .leader { stroke-width: .8; }
.line, .dashed, .step { fill: none; stroke: currentColor; stroke-width: 2.2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 6 4; } .whisker { stroke: currentColor; stroke-width: 4; stroke-opacity: .4; }
.area { fill: currentColor; fill-opacity: .16; stroke: currentColor; stroke-width: 1.6; }
.bar, .mark { fill: currentColor; } .mark { stroke: var(--panel); } .pale { fill: currentColor; fill-opacity: .28; }
""" + "".join(f".c{k} {{ color: var(--c{k}); }}\n" for k in range(COLOURS))
VARIABLES = "".join(f" --{name}: light-dark({light}, {dark});" for name, (light, dark) in PALETTE.items())
SHAPES = {"dot": "m-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0 -11 0z", "square": "m-5 -5h10v10h-10z"}  # around a point
Point = tuple[float, float]


class Series(NamedTuple):
    """Points shown as ``kind``: each a 'dot' or a 'square'; or joined, by a 'line', 'dashed', a 'whisker' (pale, wide),
    'step' (each value holds until the next), 'area' (filled steps), or around a 'pale' area. ``tip``: what pointing at
    it shows; ``name``: what stands beside its first point; ``key``: what its colour means, for the legend."""

    points: Sequence[Point]
    colour: int
    kind: str = "line"
    tip: str = ""
    name: str = ""
    key: str = ""


class Chart(NamedTuple):
    """``summary``: what a screen reader says; ``x``, ``y``: labels of the axes; ``series``: the last on top."""

    summary: str
    x: str
    y: str
    series: Sequence[Series]


class Axis(NamedTuple):
    """``ticks``: values and how they are written."""

    low: float
    high: float
    ticks: dict[float, str]


def make_axis(values: Sequence[float]) -> Axis:
    """A linear axis around the values with a margin, but not below zero if no value is; about six ticks, of ints at
    whole numbers."""
    least, most = min(values), max(values)
    spread = (most - least) or abs(most) * 0.2 or 1.0
    low, high = least - 0.1 * spread, most + 0.1 * spread
    low = low if least < 0 else max(0.0, low)
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * 6 >= (high - low) * 0.999)
    step = max(1, math.ceil(step)) if all(isinstance(value, int) for value in values) else step
    ticks = (step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))
    return Axis(low, high, {tick: f"{tick:.10g}" for tick in ticks})


def draw(chart: Chart, width: int = 460, height: int = 280) -> Markup:
    """The chart, with a legend of several keys below it, for a page that has ``STYLE`` and ``VARIABLES``."""
    drawing = _Drawing(chart, width, height)
    drawing.axes()
    for series in chart.series:
        drawing.series(series)
    for series in chart.series:
        if series.name:
            drawing.name(series.name, *drawing.at(*series.points[0]))
    height += drawing.legend()
    frame = Markup('<svg class="chart" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">')
    return frame.format(width, height, chart.summary) + Markup().join(drawing.parts) + Markup("</svg>")


def standalone(chart: Chart) -> str:
    """The chart in light colours, as an SVG file of its own."""
    style = re.sub(r"var\(--(\w+)\)", lambda found: PALETTE[found[1]][0], STYLE)
    style = f"svg {{ font-family: system-ui, sans-serif; background: #fff; }}\n{style}"
    opening, drawn = draw(chart, 640, 400).split(">", 1)
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{drawn}\n'


class _Drawing:
    """A chart at a size: where a value lies, what is drawn, and the ``busy`` points that names keep off."""

    def __init__(self, chart: Chart, width: int, height: int) -> None:
        self.chart, self.width, self.height = chart, width, height
        self.x, self.y = (make_axis([point[i] for one in chart.series for point in one.points]) for i in (0, 1))
        self.left, self.right = 14 + LETTER * max(map(len, self.y.ticks.values())), width - 14.0
        self.top, self.bottom = 30.0, height - 46.0
        self.parts: list[Markup] = []
        self.busy: list[Point] = []

    def at(self, x: float, y: float) -> Point:
        across, up = (x - self.x.low) / (self.x.high - self.x.low), (y - self.y.low) / (self.y.high - self.y.low)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def path(self, kind: str, d: str, tip: str = "") -> None:
        title = Markup("<title>{}</title>").format(tip) if tip else ""
        self.parts.append(Markup('<path class="{}" d="{}">{}</path>').format(kind, d, title))

    def text(self, x: float, y: float, text: str, anchor: str, kind: str = "tick") -> None:
        form = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
        self.parts.append(form.format(kind, x, y, anchor, text))

    def axes(self) -> None:
        for tick, text in self.y.ticks.items():
            y = self.at(self.x.low, tick)[1]
            self.path("grid", f"M{self.left:.1f} {y:.1f}H{self.right:.1f}")
            self.text(self.left - 6, y + 4, text, "end")
        free = -math.inf
        for tick, text in self.x.ticks.items():
            x = self.at(tick, self.y.low)[0]
            if (half := len(text) * LETTER / 2) + free <= x:  # else it would touch the last one
                self.path("axis", f"M{x:.1f} {self.bottom:.1f}v4")
                self.text(min(x, self.width - half), self.bottom + 18, text, "middle")
                free = x + half + 8
        self.path("axis", f"M{self.left:.1f} {self.bottom:.1f}H{self.right:.1f}")
        self.text(2, 14, self.chart.y, "start", "label")
        self.text(self.right, self.height - 6, self.chart.x, "end", "label")

    def series(self, series: Series) -> None:
        places, colour = [self.at(*point) for point in series.points], f"c{series.colour % COLOURS}"
        if series.kind in SHAPES or len(places) == 1:
            for x, y in places:
                self.path(f"mark {colour}", f"M{x:.1f} {y:.1f}{SHAPES.get(series.kind, SHAPES['dot'])}", series.tip)
            self.busy += places * 6  # worth more than a line
            return
        if series.kind in ("step", "area"):
            places = [p for a, b in itertools.pairwise(places) for p in (a, (b[0], a[1]))] + places[-1:]
        self.path(f"{series.kind} {colour}", "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places), series.tip)
        self.busy += [point for ends in itertools.pairwise(places) for point in _between(*ends)]

    def name(self, text: str, x: float, y: float) -> None:
        """Writes it right or left of a point, or as little above or below as hides least, with a line to it."""
        wide = len(text) * LETTER + 8
        sides = [max(self.left, min(left, self.width - wide)) for left in (x + 10, x - 10 - wide)]
        levels = [y + rise for rise in sorted(range(-96, 97, 16), key=abs) if 14 < y + rise < self.bottom - 8]

        def hidden(place: Point) -> int:
            return sum(-6 < a - place[0] < wide + 6 and abs(b - place[1]) < 13 for a, b in self.busy)

        left, middle = min(((left, level) for level in levels for left in sides), key=hidden)  # the first of the best
        self.busy += _between((left, middle), (left + wide, middle))
        if middle != y:
            self.path("leader", f"M{x:.1f} {y:.1f}L{max(left, min(x, left + wide)):.1f} {middle:.1f}")
        edge, anchor = (left, "start") if left > x else (left + wide, "end")
        self.text(edge, middle + 4, text, anchor, "name")

    def legend(self) -> int:
        """Below the chart, in columns; returns its height."""
        keys = list(dict.fromkeys((one.colour % COLOURS, one.key) for one in self.chart.series if one.key))
        if len(keys) < 2:
            return 0
        wide = 36 + LETTER * max(len(key) for _, key in keys)
        columns = max(1, int(self.width // wide))
        for i, (colour, key) in enumerate(keys):
            x, y = 14 + i % columns * wide, self.height + 14 + i // columns * 22
            self.path(f"mark c{colour}", f"M{x:.1f} {y:.1f}{SHAPES['square']}")
            self.text(x + 14, y + 4, key, "start")
        return math.ceil(len(keys) / columns) * 22 + 8


def _between(a: Point, b: Point) -> list[Point]:
    """Points every eight pixels or less of a line, both ends included."""
    parts = int(math.dist(a, b) // 8) + 1
    return [(a[0] + (b[0] - a[0]) * k / parts, a[1] + (b[1] - a[1]) * k / parts) for k in range(parts + 1)]
