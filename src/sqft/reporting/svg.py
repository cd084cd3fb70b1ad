"""Charts as inline SVG: no script, no image files; the page's CSS gives the colours, so charts follow its theme.

A mark of colour k has the class ``ck``. Lengths are in units of the view box, which is about as many pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8  # that the page defines; later series start again
LETTER, BOLD = 7.4, 8.1  # mean widths of a letter of the charts' 12.5-pixel text, in a wide system font
WIDTH, HEIGHT = 460, 280  # of a chart, two of which stand side by side on a wide page
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Axis:
    """A linear axis from ``low`` to ``high``; ``text`` writes a tick's value."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    text: Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """Points joined by ``kind``: 'line', 'dashed', 'step' (each value holds until the next), or 'dots'."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int
    kind: str = "line"


@dataclass(frozen=True)
class Mark:
    """A point with a label and, optionally, an interval of y. ``shape``: 'dot', 'square' or 'ring'."""

    label: str
    x: float
    y: float
    colour: int
    tip: str = ""
    interval: tuple[float, float] | None = None
    shape: str = "dot"


def plain(value: float) -> str:
    """A tick's value as short as it goes: 1.5, 0.001, 2e-05, 12.5 M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value:.10g}" if abs(value) >= 1e4 else f"{value:.4g}"


def percent(value: float) -> str:
    return f"{value * 100:.4g} %"


def make_axis(label: str, values: Sequence[float], text: Callable[[float], str] = plain, *, zero: bool = False,
              margin: float = 0.06, limits: tuple[float, float] = (-math.inf, math.inf),
              count: int = 5, whole: bool = False) -> Axis:  # fmt: skip
    """An axis around the values: with ``margin`` on both sides, or from 0; beyond ``limits`` only if values are.

    ``whole``: ticks at whole numbers only.
    """
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) * 0.2 or 1.0
    low, high = low - margin * spread, high + margin * spread
    low = min(0.0, min(values)) if zero else low
    low, high = max(low, min(limits[0], min(values))), min(high, max(limits[1], max(values)))
    step = _step((high - low) / count)
    return Axis(label, low, high, ticks_between(low, high, max(1.0, math.ceil(step)) if whole else step), text)


def ticks_between(low: float, high: float, step: float = 0.0) -> tuple[float, ...]:
    """Multiples of ``step``, or of a round number that gives about seven of them."""
    step = step or _step((high - low) / 7)
    return tuple(step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)


class Canvas:
    """The frame of a chart, and where a value lies in it."""

    def __init__(self, x: Axis, y: Axis, width: int, height: int) -> None:
        self.x, self.y, self.width, self.height = x, y, width, height
        widest = max((len(y.text(tick)) for tick in y.ticks), default=1)
        self.left, self.right = 14 + widest * LETTER, width - 14.0
        self.top, self.bottom = 30.0 if y.label else 10.0, height - 46.0

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x.low) / ((self.x.high - self.x.low) or 1)
        up = (y - self.y.low) / ((self.y.high - self.y.low) or 1)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def finish(self, marks: Sequence[str], summary: str) -> str:
        """The whole SVG: grid, axes, then the marks. ``summary`` is what a screen reader says."""
        parts = []
        for tick in self.y.ticks:
            y = self.at(self.x.low, tick)[1]
            parts.append(f'<path class="grid" d="M{self.left:.1f} {y:.1f}H{self.right:.1f}"/>')
            parts.append(text_at(self.left - 6, y + 4, self.y.text(tick), "end"))
        last = -math.inf
        for tick in self.x.ticks:
            x, text = self.at(tick, self.y.low)[0], self.x.text(tick)
            if x - last < len(text) * LETTER + 8:
                continue  # labels would touch
            last = x
            parts.append(f'<path class="axis" d="M{x:.1f} {self.bottom:.1f}v4"/>')
            parts.append(text_at(min(x, self.width - len(text) * LETTER / 2), self.bottom + 18, text, "middle"))
        parts.append(f'<path class="axis" d="M{self.left:.1f} {self.bottom:.1f}H{self.right:.1f}"/>')
        parts.append(text_at(2, 14, self.y.label, "start", "label") if self.y.label else "")
        parts.append(text_at(self.right, self.height - 6, self.x.label, "end", "label"))
        return frame(self.width, self.height, "".join(parts) + "".join(marks), summary)


def frame(width: float, height: float, inside: str, summary: str, kind: str = "chart") -> str:
    return (f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
            f'aria-label="{escape(summary)}">{inside}</svg>')  # fmt: skip


def text_at(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def lines(series: Sequence[Series], x: Axis, y: Axis, summary: str, marks: Sequence[Mark] = (), width: int = WIDTH,
          height: int = HEIGHT) -> str:  # fmt: skip
    """Curves, and labelled points on top of them."""
    canvas = Canvas(x, y, width, height)
    drawn = [_curve(canvas, one) for one in series if one.points]
    return canvas.finish(drawn + _marks(canvas, marks, _covered(canvas, series)), summary)


def _covered(canvas: Canvas, series: Sequence[Series]) -> list[Box]:
    """Small boxes along the curves, which labels keep off."""
    boxes: list[Box] = []
    for one in series:
        places = [canvas.at(*point) for point in one.points]
        for (ax, ay), (bx, by) in itertools.pairwise(places):
            if one.kind == "step":
                boxes += [(ax, ay - 2, bx, ay + 2), (bx - 2, min(ay, by), bx + 2, max(ay, by))]
            else:
                share = [k / 12 for k in range(13)]
                centres = [(ax + k * (bx - ax), ay + k * (by - ay)) for k in share]
                boxes += [(x - 2, y - 2, x + 2, y + 2) for x, y in centres]
    return boxes


def _curve(canvas: Canvas, series: Series) -> str:
    places = [canvas.at(*point) for point in series.points]
    colour = f"c{series.colour % COLOURS}"
    if series.kind == "dots":
        dots = "".join(f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in places)
        return f'<g class="{colour}">{dots}</g>'
    start, rest = places[0], places[1:]
    steps = "".join(f"H{px:.1f}V{py:.1f}" if series.kind == "step" else f"L{px:.1f} {py:.1f}" for px, py in rest)
    end = f"H{canvas.right:.1f}" if series.kind == "step" else ""
    kind = "line dashed" if series.kind == "dashed" else "line"
    path = f'<path class="{kind} {colour}" d="M{start[0]:.1f} {start[1]:.1f}{steps}{end}"/>'
    if rest:
        return path
    return path + f'<circle class="dot {colour}" cx="{start[0]:.1f}" cy="{start[1]:.1f}" r="3"/>'  # a line of one point


def scatter(marks: Sequence[Mark], x: Axis, y: Axis, summary: str, curves: Sequence[Series] = (), width: int = WIDTH,
            height: int = HEIGHT) -> str:  # fmt: skip
    """Labelled points with intervals."""
    return lines(curves, x, y, summary, marks, width, height)


def _marks(canvas: Canvas, marks: Sequence[Mark], covered: Sequence[Box]) -> list[str]:
    places = [canvas.at(mark.x, mark.y) for mark in marks]
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in places] + list(covered)
    behind, front, labels = [], [], []
    for mark, (x, y) in zip(marks, places, strict=True):
        colour = f"c{mark.colour % COLOURS}"
        if mark.interval:
            low, high = (canvas.at(mark.x, end)[1] for end in mark.interval)
            ends = f"M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8M{x:.1f} {low:.1f}V{high:.1f}"
            behind.append(f'<path class="whisker {colour}" d="{ends}"/>')
            taken.append((x - 2, high, x + 2, low))
        front.append(_shape(mark, x, y, colour))
    for mark, (x, y) in zip(marks, places, strict=True):
        if mark.label:
            labels.append(_label(canvas, mark.label, x, y, taken))
    return behind + front + labels


def _shape(mark: Mark, x: float, y: float, colour: str) -> str:
    tip = f"<title>{escape(mark.tip or mark.label)}</title>"
    if mark.shape == "square":
        place = f'x="{x - 5:.1f}" y="{y - 5:.1f}"'
        return f'<rect class="dot {colour}" {place} width="10" height="10" rx="1.5">{tip}</rect>'
    if mark.shape == "ring":
        return f'<circle class="ring {colour}" cx="{x:.1f}" cy="{y:.1f}" r="9">{tip}</circle>'
    return f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="5.5">{tip}</circle>'


def _label(canvas: Canvas, text: str, x: float, y: float, taken: list[Box]) -> str:
    """Puts a label where it covers least of the others; with a thin line to its point if that is farther away."""
    width, best = len(text) * BOLD, None
    for far in (0, 1, 2, 3):
        rise = 16 * far
        for side, dy in ((1, 4 - rise), (-1, 4 - rise), (1, 4 + rise), (-1, 4 + rise), (0, -10 - rise), (0, 20 + rise)):
            left = x + 10 if side > 0 else x - 10 - width if side < 0 else x - width / 2
            box = (left, y + dy - 11, left + width, y + dy + 3)
            outside = max(0.0, canvas.left - box[0]) + max(0.0, box[2] - canvas.width)
            outside += max(0.0, 18 - box[1]) + max(0.0, box[3] - canvas.bottom)
            cost = sum(_overlap(box, other) for other in taken) + 60 * outside + 25 * far
            if best is None or cost < best[0]:
                best = (cost, box, far, side)
    assert best is not None
    _, box, far, side = best
    taken.append(box)
    middle = (box[0] + box[2]) / 2
    end = min(max(x, box[0]), box[2]) if abs(middle - x) < width else x
    edge = box[3] if box[3] < y else box[1]
    leader = f'<path class="leader" d="M{x:.1f} {y:.1f}L{end:.1f} {edge:.1f}"/>' if far else ""
    anchor = {1: "start", 0: "middle", -1: "end"}[side]  # the estimated width does not move the end at the point
    return leader + text_at({1: box[0], 0: middle, -1: box[2]}[side], box[3] - 3, text, anchor, "name")


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
