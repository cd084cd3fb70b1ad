"""Charts of many values, as inline SVG: heat maps of layers and modules, histograms, and the stages' pictograms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from sqft.reporting.svg import COLOURS, HEIGHT, LETTER, WIDTH, Axis, Canvas, frame, text_at, ticks_between

Table = dict[str, dict[int, float]]  # module -> layer -> value


@dataclass(frozen=True)
class Bars:
    """Counts of one folder's weights by bin, as shares. ``pruned``: share that is pruned, drawn at bin 0 apart."""

    label: str
    shares: Mapping[float, float]
    pruned: float
    colour: int


def by_layer(values: Mapping[str, float]) -> Table:
    """'model.layers.3.mlp.up_proj' or '3.up_proj' -> rows of modules, columns of layers; others are left out."""
    table: Table = {}
    for name, value in values.items():
        parts = name.split(".")
        layer = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if layer is not None:
            module = ".".join(parts[layer + 1 :]) or "all"
            table.setdefault(module, {})[int(parts[layer])] = value
    return table


def heat_map(table: Table, low: float, high: float, text: Callable[[float], str], summary: str) -> str:
    """Rows of modules, columns of layers, the mean of a row at its right; a cell's tooltip has its value."""
    layers = sorted({layer for row in table.values() for layer in row})
    size = max(14.0, min(40.0, 850 / len(layers)))
    height, left, top = 22.0, 14 + max(len(module) for module in table) * LETTER, 22.0
    parts = []
    for i, layer in enumerate(layers):
        if size >= 20 or layer % 5 == 0:
            parts.append(text_at(left + (i + 0.5) * size, 14, str(layer), "middle"))
    for r, (module, row) in enumerate(table.items()):
        y = top + r * height
        parts.append(text_at(left - 8, y + 15, module, "end"))
        for i, layer in enumerate(layers):
            value = row.get(layer)
            tip = f"layer {layer}, {module}: {'-' if value is None else text(value)}"
            shade = "" if value is None else f' fill-opacity="{_shade(value, low, high):.3f}"'
            parts.append(f'<rect class="{"cell none" if value is None else "cell"}" x="{left + i * size + 1:.1f}" '
                         f'y="{y + 1:.1f}" width="{size - 2:.1f}" height="{height - 2:.1f}" rx="2"{shade}>'
                         f"<title>{escape(tip)}</title></rect>")  # fmt: skip
        mean = text(sum(row.values()) / len(row))
        parts.append(text_at(left + len(layers) * size + 8, y + 15, mean, "start"))
    width = left + len(layers) * size + 16 + 9 * LETTER
    return frame(round(width), top + len(table) * height + 4, "".join(parts), summary, "heat")


def _shade(value: float, low: float, high: float) -> float:
    return 0.06 + 0.94 * min(1.0, max(0.0, (value - low) / ((high - low) or 1)))


def histogram(groups: Sequence[Bars], label: str, text: Callable[[float], str], summary: str,
              outline: bool = False) -> str:  # fmt: skip
    """Bars side by side, or (for many bins) outlines over one another. What is pruned would dwarf the rest: it is a bar
    at 0 that breaks off at the top."""
    bins = sorted({value for bars in groups for value in bars.shares})
    tallest = max((share for bars in groups for share in bars.shares.values()), default=0.0) or 1.0
    step = min((b - a for a, b in itertools.pairwise(bins)), default=1.0)
    limit = tallest * 1.3
    ticks = ticks_between(bins[0], bins[-1]) if outline else tuple(bins[i] for i in _every(len(bins), bins))
    x = Axis(label, bins[0] - step, bins[-1] + step, ticks, text)
    rise = _nice(tallest)
    heights = tuple(k * rise for k in range(1 + int(1e-9 + tallest / rise)))
    y = Axis("share of the weights", 0, limit, heights, lambda value: f"{value * 100:.3g} %")
    canvas = Canvas(x, y, WIDTH, HEIGHT)
    slot = (canvas.right - canvas.left) * step / (x.high - x.low)
    bar = slot * 0.86 / len(groups)
    parts = []
    for g, bars in enumerate(groups):
        colour = f"c{bars.colour % COLOURS}"
        edges = []
        for value, share in sorted(bars.shares.items()):
            px, py = canvas.at(value, share)
            left = px - slot * 0.43 + g * bar
            tip = f"{bars.label}, {text(value)}: {share * 100:.3g} % of the weights"
            edges.append(f"L{px - slot / 2:.2f} {py:.2f}h{slot:.2f}")
            if not outline:
                parts.append(_bar(left, py, bar, canvas.bottom, colour, tip))
            if abs(value) < step / 2 and bars.pruned:
                tip = f"{bars.label}: {bars.pruned * 100:.2f} % of the weights are pruned"
                parts.append(_broken(left, canvas.top, bar, canvas.bottom if outline else py, colour, tip))
        if outline:
            parts.append(f'<path class="line thin {colour}" d="M{edges[0][1:]}{"".join(edges[1:])}"/>')
    return canvas.finish(parts, summary)


def _every(count: int, bins: Sequence[float]) -> list[int]:
    """Places of at most about nine ticks, 0 among them."""
    middle = min(range(count), key=lambda i: abs(bins[i]))
    step = max(1, -(-count // 8))
    return sorted({*range(middle, count, step), *range(middle, -1, -step)})


def _nice(tallest: float) -> float:
    for exponent in range(-9, 1):
        for factor in (1, 2, 5):
            if factor * 10.0**exponent * 4.5 >= tallest:
                return factor * 10.0**exponent
    return 0.25


def _bar(x: float, top: float, width: float, bottom: float, colour: str, tip: str) -> str:
    return (f'<rect class="dot {colour}" x="{x:.2f}" y="{top:.2f}" width="{max(0.6, width - 0.6):.2f}" '
            f'height="{max(0.0, bottom - top):.2f}"><title>{escape(tip)}</title></rect>')  # fmt: skip


def _broken(x: float, top: float, width: float, bottom: float, colour: str, tip: str) -> str:
    """A pale bar whose upper end is a zigzag."""
    right = x + max(0.6, width - 0.6)
    zigzag = f"L{right:.2f} {top + 5:.2f}L{(x + right) / 2:.2f} {top:.2f}L{x:.2f} {top + 5:.2f}"
    return (f'<path class="dot pale {colour}" d="M{x:.2f} {bottom:.2f}H{right:.2f}{zigzag}Z">'
            f"<title>{escape(tip)}</title></path>")  # fmt: skip


def pictogram(kind: str) -> str:
    """A small matrix that shows what a stage does to one: full, with holes, on a grid, beside two thin ones."""
    holes = {(r, c) for r in range(5) for c in range(5) if (r * 7 + c * 3 + r * c) % 5 in (0, 2)}
    cells = []
    for r in range(5):
        for c in range(5):
            gone = (r, c) in holes and kind != "model"
            colour = "hole" if gone else "dot c0"
            level = 1.0
            if kind in ("quantize", "merge") and not gone:
                level = (0.35, 0.6, 1.0)[(r + 2 * c) % 3]
            if kind in ("train", "search", "extract"):
                colour, level = ("hole", 1.0) if gone else ("dot c0", 0.3)
            if kind == "merge" and not gone:
                colour = "dot c2"
            cells.append(f'<rect class="{colour}" x="{c * 8 + 1}" y="{r * 8 + 1}" width="7" height="7" rx="1.2" '
                         f'fill-opacity="{level}"/>')  # fmt: skip
    if kind in ("train", "search", "extract"):
        shown = 2 if kind == "train" else 1
        for at in (45, 51)[:shown]:
            cells.append(f'<rect class="dot c1" x="{at}" y="1" width="4.5" height="39" rx="1.2"/>')
            cells.append(f'<rect class="dot c1" x="1" y="{at}" width="39" height="4.5" rx="1.2"/>')
        return frame(58, 58, "".join(cells), f"what {kind} does to a weight matrix", "glyph")
    return frame(42, 42, "".join(cells), f"what {kind} does to a weight matrix", "glyph")
