"""Charts as SVG, for the report's page and a search's folder: no script, no image files, every text escaped.

A mark of colour k has the class ``ck``; the colours are the page's, so that charts follow its theme. Lengths are in
units of the view box, which is about as many pixels.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

COLOURS = 8  # of series; later ones start again
LETTER, BOLD = 7.4, 8.1  # mean widths of a letter of the charts' 12.5-pixel text, in a wide system font
Box = tuple[float, float, float, float]  # left, top, right, bottom

PALETTE = {  # name: (in light, in dark)
    "panel": ("#ffffff", "#171b21"), "ink": ("#15191f", "#e9ecf1"), "soft": ("#545c68", "#a5aebb"),
    "grid": ("#e8ebef", "#262c34"), "c0": ("#1d5fc4", "#6aa5ff"), "c1": ("#c2570c", "#ff9d52"),
    "c2": ("#12805c", "#4fd0a0"), "c3": ("#7a3fb8", "#c39bff"), "c4": ("#b3245f", "#ff86b3"),
    "c5": ("#0d7a8c", "#4fc9dc"), "c6": ("#7d6408", "#dcbf4a"), "c7": ("#7d8794", "#8b95a3"),
}  # fmt: skip
STYLE = """svg text { fill: var(--ink); font-size: 12.5px; font-family: inherit; }
svg .tick, svg .label { fill: var(--soft); } svg .label, svg .name { font-weight: 600; }
svg .name { paint-order: stroke; stroke: var(--panel); stroke-width: 3px; stroke-linejoin: round; }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); fill: none; }
.line, .ring, .whisker { fill: none; stroke: currentColor; stroke-width: 2.2; stroke-linejoin: round; }
.thin { stroke-width: 1.6; } .dashed { stroke-dasharray: 6 4; } .whisker { stroke-width: 1.4; stroke-opacity: .55; }
.bar, .mark { fill: currentColor; } .mark { stroke: var(--panel); } .pale { fill-opacity: .28; }
.leader { stroke: var(--soft); stroke-width: .8; fill: none; }
""" + "".join(f".c{k} {{ color: var(--c{k}); }}\n" for k in range(COLOURS))
VARIABLES = "".join(f" --{name}: light-dark({light}, {dark});" for name, (light, dark) in PALETTE.items())


class Axis(NamedTuple):
    """A linear axis from ``low`` to ``high``; ``text`` writes a tick's value."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    text: Callable[[float], str]


class Curve(NamedTuple):
    """Points joined by ``kind``: 'line', 'dashed', 'step' (each value holds until the next), or 'dots'."""

    points: Sequence[tuple[float, float]]
    colour: int
    kind: str = "line"


class Mark(NamedTuple):
    """A point with a label and, optionally, an interval of y. ``shape``: 'dot', 'square' or 'ring'."""

    label: str
    x: float
    y: float
    colour: int
    tip: str = ""
    interval: tuple[float, float] | None = None
    shape: str = "dot"


class Bars(NamedTuple):
    """Shares of weights by bin. ``pruned``: the share that is pruned, drawn apart at bin 0."""

    label: str
    shares: Mapping[float, float]
    pruned: float
    colour: int


@dataclass(frozen=True)
class Chart:
    """``keys``: (class, label) pairs of a legend. ``summary`` is what a screen reader says."""

    summary: str
    x: Axis
    y: Axis
    curves: Sequence[Curve] = ()
    marks: Sequence[Mark] = ()
    bars: Sequence[Bars] = ()
    outline: bool = False  # of the bars alone, for many bins
    keys: Sequence[tuple[str, str]] = ()


def plain(value: float) -> str:
    """A tick's value as short as it goes: 1.5, 0.001, 2e-05, 12.5 M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value:.10g}" if abs(value) >= 1e4 else f"{value:.4g}"


def make_axis(label: str, values: Sequence[float], text: Callable[[float], str] = plain, *, zero: bool = False,
              margin: float = 0.06, limits: tuple[float, float] = (-math.inf, math.inf),
              count: int = 5, whole: bool = False) -> Axis:  # fmt: skip
    """An axis around the values: with ``margin`` on both sides, or from 0; beyond ``limits`` only if values are.

    ``count``: about so many ticks; ``whole``: at whole numbers only.
    """
    least, most = min(values), max(values)
    spread = (most - least) or abs(most) * 0.2 or 1.0
    low = min(0.0, least) if zero else max(least - margin * spread, min(limits[0], least))
    high = min(most + margin * spread, max(limits[1], most))
    step = _step((high - low) / count)
    step = max(1.0, math.ceil(step)) if whole else step
    ticks = [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(label, low, high, ticks, text)


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)


def histogram(bars: Sequence[Bars], label: str, text: Callable[[float], str], summary: str, outline: bool) -> Chart:
    """Bars side by side, or outlines over one another."""
    bins = sorted({value for one in bars for value in one.shares}) or [0.0]
    step = min((b - a for a, b in itertools.pairwise(bins)), default=1.0)
    tallest = max((share for one in bars for share in one.shares.values()), default=0.0) or 1.0
    x = make_axis(label, [bins[0] - step, bins[-1] + step], text, margin=0, count=9, whole=not outline)
    y = make_axis("share of the weights", [0, tallest], lambda v: f"{v * 100:.3g} %", margin=0)
    keys = [(f"c{one.colour}", one.label) for one in bars]
    return Chart(summary, x, y._replace(high=tallest * 1.3), bars=bars, outline=outline, keys=keys)


def draw(chart: Chart, width: int = 460, height: int = 280) -> Markup:
    """The chart without its legend, for a page that has ``STYLE`` and the variables of ``PALETTE``."""
    return _Drawing(chart, width, height).finish()


def standalone(chart: Chart, width: int = 640, height: int = 400) -> str:
    """The chart with its legend, in light colours, as an SVG file of its own."""
    style = re.sub(r"var\(--(\w+)\)", lambda m: PALETTE[m[1]][0], STYLE)
    form, legend, x = Markup('<path class="{} {}" d="{}"/><text x="{}" y="{}">{}</text>'), Markup(), 14.0
    for kind, label in chart.keys:
        shape = "ring" if "ring" in kind else "square"
        d = _outline(shape, x, height + 10.0)
        legend += form.format("ring" if shape == "ring" else "mark", kind, d, x + 14, height + 14, label)
        x += 40 + len(label) * LETTER
    return Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" '
                  'font-family="system-ui, sans-serif"><style>{2}</style><rect width="100%" height="100%" fill="#fff"/>'
                  "{3}{4}</svg>\n").format(width, height + 28, style, draw(chart, width, height), legend)  # fmt: skip


def _outline(shape: str, x: float, y: float) -> str:
    if shape == "square":
        return f"M{x - 5:.1f} {y - 5:.1f}h10v10h-10z"
    r = {"ring": 9, "small": 3}.get(shape, 5.5)
    return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0"


class _Drawing:
    """A chart at a size: where a value lies, what is drawn, and the boxes that labels keep off."""

    def __init__(self, chart: Chart, width: int, height: int) -> None:
        self.chart, self.width, self.height = chart, width, height
        self.x, self.y = chart.x, chart.y
        widest = max((len(self.y.text(tick)) for tick in self.y.ticks), default=1)
        self.left, self.right = 14 + widest * LETTER, width - 14.0
        self.top, self.bottom = 30.0 if self.y.label else 10.0, height - 46.0
        self.parts: list[Markup] = []
        self.taken: list[Box] = []

    def finish(self) -> Markup:
        self._axes()
        for curve in self.chart.curves:
            if curve.points:
                self._curve(curve)
        for i, bars in enumerate(self.chart.bars):
            self._bars(bars, i)
        self._marks()
        frame = Markup('<svg class="chart" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" '
                       'aria-label="{2}">{3}</svg>')  # fmt: skip
        return frame.format(self.width, self.height, self.chart.summary, Markup("").join(self.parts))

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x.low) / ((self.x.high - self.x.low) or 1)
        up = (y - self.y.low) / ((self.y.high - self.y.low) or 1)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def path(self, kind: str, d: str, tip: str = "") -> None:
        title = Markup("<title>{}</title>").format(tip) if tip else ""
        self.parts.append(Markup('<path class="{}" d="{}">{}</path>').format(kind, d, title))

    def text(self, x: float, y: float, text: str, anchor: str, kind: str = "tick") -> None:
        form = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
        self.parts.append(form.format(kind, x, y, anchor, text))

    def _axes(self) -> None:
        for tick in self.y.ticks:
            y = self.at(self.x.low, tick)[1]
            self.path("grid", f"M{self.left:.1f} {y:.1f}H{self.right:.1f}")
            self.text(self.left - 6, y + 4, self.y.text(tick), "end")
        last = -math.inf
        for tick in self.x.ticks:
            x, text = self.at(tick, self.y.low)[0], self.x.text(tick)
            if x - last < len(text) * LETTER + 8:
                continue  # labels would touch
            last = x
            self.path("axis", f"M{x:.1f} {self.bottom:.1f}v4")
            self.text(min(x, self.width - len(text) * LETTER / 2), self.bottom + 18, text, "middle")
        self.path("axis", f"M{self.left:.1f} {self.bottom:.1f}H{self.right:.1f}")
        self.text(2, 14, self.y.label, "start", "label")
        self.text(self.right, self.height - 6, self.x.label, "end", "label")

    def _curve(self, curve: Curve) -> None:
        places = [self.at(*point) for point in curve.points]
        colour = f"c{curve.colour % COLOURS}"
        if curve.kind == "dots" or len(places) == 1:
            for x, y in places:
                self.path(f"mark {colour}", _outline("small", x, y))
            return
        if curve.kind == "step":
            corners = [(b[0], a[1]) for a, b in itertools.pairwise(places)]
            places = [p for pair in itertools.zip_longest(places, corners) for p in pair if p]
            places.append((self.right, places[-1][1]))
        kind = "line dashed" if curve.kind == "dashed" else "line"
        self.path(f"{kind} {colour}", "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places))
        for (ax, ay), (bx, by) in itertools.pairwise(places):  # small boxes along it
            along = [(ax + k / 12 * (bx - ax), ay + k / 12 * (by - ay)) for k in range(13)]
            self.taken += [(x - 2, y - 2, x + 2, y + 2) for x, y in along]

    def _bars(self, bars: Bars, index: int) -> None:
        """What is pruned would dwarf the rest: it is a pale bar at 0 that breaks off at the top, in a zigzag."""
        bins = sorted(bars.shares)
        step = min((b - a for a, b in itertools.pairwise(bins)), default=1.0)
        slot = (self.right - self.left) * step / (self.x.high - self.x.low)
        bar = slot * 0.86 / len(self.chart.bars)
        kind, edges = f"bar c{bars.colour % COLOURS}", []
        for value in bins:
            share = bars.shares[value]
            x, y = self.at(value, share)
            left, wide = x - slot * 0.43 + index * bar, max(0.6, bar - 0.6)
            edges.append(f"{x - slot / 2:.2f} {y:.2f}h{slot:.2f}")
            if not self.chart.outline:
                tip = f"{bars.label}, {self.x.text(value)}: {share * 100:.3g} % of the weights"
                self.path(kind, f"M{left:.2f} {self.bottom:.2f}V{y:.2f}h{wide:.2f}V{self.bottom:.2f}z", tip)
            if abs(value) < step / 2 and bars.pruned:
                foot = self.bottom if self.chart.outline else y
                zigzag = f"V{self.top + 5:.2f}l{-wide / 2:.2f} -5l{-wide / 2:.2f} 5z"
                tip = f"{bars.label}: {bars.pruned * 100:.2f} % of the weights are pruned"
                self.path(f"{kind} pale", f"M{left:.2f} {foot:.2f}h{wide:.2f}{zigzag}", tip)
        if self.chart.outline and edges:
            self.path(f"line thin c{bars.colour % COLOURS}", "M" + "L".join(edges))

    def _marks(self) -> None:
        placed = [(mark, *self.at(mark.x, mark.y)) for mark in self.chart.marks]
        self.taken += [(x - 6, y - 6, x + 6, y + 6) for _, x, y in placed]
        for mark, x, _ in placed:
            if mark.interval:
                low, high = (self.at(mark.x, end)[1] for end in mark.interval)
                ends = f"M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8M{x:.1f} {low:.1f}V{high:.1f}"
                self.path(f"whisker c{mark.colour % COLOURS}", ends)
                self.taken.append((x - 2, high, x + 2, low))
        for mark, x, y in placed:
            kind = "ring" if mark.shape == "ring" else "mark"
            self.path(f"{kind} c{mark.colour % COLOURS}", _outline(mark.shape, x, y), mark.tip or mark.label)
        for mark, x, y in placed:
            if mark.label:
                self._label(mark.label, x, y)

    def _label(self, text: str, x: float, y: float) -> None:
        """Puts a label where it covers least of the others; with a thin line to its point if that is farther away."""
        width, best = len(text) * BOLD, (math.inf, (0.0, 0.0, 0.0, 0.0), 0, 0)
        for far in range(7):
            rise = 16 * far
            for side, dy in (
                (1, 4 - rise),
                (-1, 4 - rise),
                (1, 4 + rise),
                (-1, 4 + rise),
                (0, -10 - rise),
                (0, 20 + rise),
            ):
                left = x + 10 if side > 0 else x - 10 - width if side < 0 else x - width / 2
                best = min(best, self._place(left, y + dy, width, far, side), key=lambda place: place[0])
        _, box, far, side = best
        self.taken.append(box)
        if far:
            near = box[3] if box[3] < y else box[1]
            self.path("leader", f"M{x:.1f} {y:.1f}L{min(max(x, box[0]), box[2]):.1f} {near:.1f}")
        start = {1: box[0], 0: (box[0] + box[2]) / 2, -1: box[2]}[side]  # where the estimated width does not matter
        self.text(start, box[3] - 3, text, {1: "start", 0: "middle", -1: "end"}[side], "name")

    def _place(self, left: float, base: float, width: float, far: int, side: int) -> tuple[float, Box, int, int]:
        """(cost, box, far, side) of a label."""
        box = (left, base - 11, left + width, base + 3)
        outside = max(0.0, self.left - box[0]) + max(0.0, box[2] - self.width)
        outside += max(0.0, 18 - box[1]) + max(0.0, box[3] - self.bottom)
        return sum(_overlap(box, other) for other in self.taken) + 60 * outside + 25 * far, box, far, side


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
