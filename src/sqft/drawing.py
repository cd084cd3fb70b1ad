"""Charts as SVG, for the report's page and a search's folder: no script, no image files, every text escaped. A mark of
colour k has the class ``ck``; the colours are the page's, so that charts follow its theme."""

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
.area { fill: currentColor; fill-opacity: .16; stroke: currentColor; stroke-width: 1.6; }
.dashed { stroke-dasharray: 6 4; } .whisker { stroke-width: 1.4; stroke-opacity: .55; }
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
    """Points joined by ``kind``: 'line', 'dashed', or 'step' (each value holds until the next)."""

    points: Sequence[tuple[float, float]]
    colour: int
    kind: str = "line"


class Mark(NamedTuple):
    """A point, perhaps with an interval of y. ``shape``: 'dot', 'square' or 'ring'."""

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
    ``count``: about so many ticks; ``whole``: at whole numbers only."""
    least, most = min(values), max(values)
    spread = (most - least) or abs(most) * 0.2 or 1.0
    low = min(0.0, least) if zero else max(least - margin * spread, min(limits[0], least))
    high = min(most + margin * spread, max(limits[1], most))
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * count >= (high - low) * 0.999)
    step = max(1.0, math.ceil(step)) if whole else step
    ticks = [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(label, low, high, ticks, text)


def histogram(bars: Sequence[Bars], label: str, text: Callable[[float], str], summary: str) -> Chart:
    """Outlines over one another; what is pruned stands apart."""
    bins, step = _bins(bars)
    x = make_axis(label, [bins[0] - step, bins[-1] + step], text, margin=0, count=9)
    tallest = max(share for one in bars for share in one.shares.values()) or 1.0
    y = make_axis("share of the weights", [0, tallest], lambda v: f"{v * 100:.3g} %", margin=0)
    keys = [(f"c{one.colour}", one.label) for one in bars]
    return Chart(summary, x, y._replace(high=tallest * 1.3), bars=bars, keys=keys)


def _bins(bars: Sequence[Bars]) -> tuple[list[float], float]:
    """All bins, at least one, and how far they lie apart."""
    bins = sorted({value for one in bars for value in one.shares} | {0.0})
    return bins, min((b - a for a, b in itertools.pairwise(bins)), default=1.0)


def draw(chart: Chart, width: int = 460, height: int = 280) -> Markup:
    """The chart, with a legend of several keys below it, for a page that has ``STYLE`` and ``VARIABLES``."""
    return _Drawing(chart, width, height).finish()


def standalone(chart: Chart, width: int = 640, height: int = 400) -> str:
    """The chart in light colours, as an SVG file of its own."""
    style = re.sub(r"var\(--(\w+)\)", lambda m: PALETTE[m[1]][0], STYLE)
    drawn = str(draw(chart, width, height)).removeprefix("<svg")
    return ('<svg xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" style="background: #fff"'
            + drawn.replace(">", f"><style>{style}</style>", 1) + "\n")  # fmt: skip


def _outline(shape: str, x: float, y: float) -> str:
    if shape == "square":
        return f"M{x - 5:.1f} {y - 5:.1f}h10v10h-10z"
    r = 9 if shape == "ring" else 5.5
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
            self._curve(curve)
        for i, bars in enumerate(self.chart.bars):
            self._bars(bars, i)
        self._marks()
        height = self._legend()
        frame = Markup('<svg class="chart" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" '
                       'aria-label="{2}">{3}</svg>')  # fmt: skip
        return frame.format(self.width, height, self.chart.summary, Markup("").join(self.parts))

    def at(self, x: float, y: float) -> tuple[float, float]:
        across, up = (x - self.x.low) / (self.x.high - self.x.low), (y - self.y.low) / (self.y.high - self.y.low)
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
        places, colour = [self.at(*point) for point in curve.points], f"c{curve.colour % COLOURS}"
        if len(places) == 1:
            self.path(f"mark {colour}", _outline("dot", *places[0]))
            return
        if curve.kind == "step":
            places = [p for a, b in itertools.pairwise([*places, (self.right, 0.0)]) for p in (a, (b[0], a[1]))]
        kind = "line dashed" if curve.kind == "dashed" else "line"
        self.path(f"{kind} {colour}", "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places))
        for (ax, ay), (bx, by) in itertools.pairwise(places):  # small boxes along it
            along = [(ax + k / 12 * (bx - ax), ay + k / 12 * (by - ay)) for k in range(13)]
            self.taken += [(x - 2, y - 2, x + 2, y + 2) for x, y in along]

    def _bars(self, bars: Bars, index: int) -> None:
        """What is pruned would dwarf the rest: it is a pale bar at 0 that breaks off at the top, in a zigzag."""
        (bins, step), colour = _bins(self.chart.bars), f"c{bars.colour % COLOURS}"
        slot = (self.right - self.left) * step / (self.x.high - self.x.low)
        places = [self.at(value, bars.shares.get(value, 0.0)) for value in bins]
        tops = [f"{x - slot / 2:.2f} {y:.2f}h{slot:.2f}" for x, y in places]
        start = f"M{places[0][0] - slot / 2:.2f} {self.bottom:.2f}L"
        self.path(f"area {colour}", start + "L".join(tops) + f"V{self.bottom:.2f}", bars.label)
        if bars.pruned:
            wide = slot * 0.86 / len(self.chart.bars)
            left = self.at(0, 0)[0] + (index - len(self.chart.bars) / 2) * wide
            zigzag = f"V{self.top + 5:.2f}l{-wide / 2:.2f} -5l{-wide / 2:.2f} 5z"
            tip = f"{bars.label}: {bars.pruned * 100:.2f} % of the weights are pruned"
            self.path(f"bar pale {colour}", f"M{left:.2f} {self.bottom:.2f}h{wide:.2f}{zigzag}", tip)

    def _marks(self) -> None:
        placed = [(mark, *self.at(mark.x, mark.y)) for mark in self.chart.marks]
        for mark, x, y in placed:
            self.taken.append((x - 6, y - 6, x + 6, y + 6))
            if mark.interval:
                low, high = (self.at(mark.x, end)[1] for end in mark.interval)
                ends = f"M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8M{x:.1f} {low:.1f}V{high:.1f}"
                self.path(f"whisker c{mark.colour % COLOURS}", ends)
                self.taken.append((x - 2, high, x + 2, low))
        for mark, x, y in placed:
            kind = "ring" if mark.shape == "ring" else "mark"
            self.path(f"{kind} c{mark.colour % COLOURS}", _outline(mark.shape, x, y), mark.tip)
        for mark, x, y in placed:
            if mark.label:
                self._label(mark.label, x, y)

    def _label(self, text: str, x: float, y: float) -> None:
        """Puts a label right or left of its point, else as little above or below as is free, with a line to it."""
        width = len(text) * BOLD
        places = [(left, y + 4 + rise) for rise in (0, -16, 16, -32, 32, -48, 48, -64, 64, -80, 80, -96, 96)
                  for left in (x + 10, x - 10 - width)]  # fmt: skip
        boxes = [(left, base - 11, left + width, base + 3) for left, base in places]
        box = min(boxes, key=self._covered)  # the first of the best
        self.taken.append(box)
        if abs(box[3] - 7 - y) > 1:
            self.path("leader", f"M{x:.1f} {y:.1f}L{box[0] if box[0] > x else box[2]:.1f} {box[3] - 7:.1f}")
        right = box[0] > x
        self.text(box[0] if right else box[2], box[3] - 3, text, "start" if right else "end", "name")

    def _legend(self) -> int:
        """Below the chart, in as many lines as it takes; returns the height of both."""
        x, y = 14.0, self.height - 10
        for kind, label in self.chart.keys if len(self.chart.keys) > 1 else ():
            wide = 34 + len(label) * BOLD
            x, y = (x, y) if x + wide < self.width and y > self.height else (14.0, y + 22)
            shape = "ring" if "ring" in kind else "square"
            self.path(kind if shape == "ring" else f"mark {kind}", _outline(shape, x, y))
            self.text(x + 14, y + 4, label, "start")
            x += wide
        return y + 14

    def _covered(self, box: Box) -> float:
        """How much of what is there already a label in this box would hide, or how far it would leave the chart."""
        outside = max(0.0, self.left - box[0], box[2] - self.width, 18 - box[1], box[3] - self.bottom)
        sides = ((min(box[2], b[2]) - max(box[0], b[0]), min(box[3], b[3]) - max(box[1], b[1])) for b in self.taken)
        return 60 * outside + sum(max(0.0, across) * max(0.0, down) for across, down in sides)
