"""Two pictures of a search: how it went, and score over cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqft.searching.picking import Evaluated, pareto_front

BLUE, ORANGE, GREY = "#2563a8", "#d1601c", "#8a8f98"
MARKERS = {"maximal": "^", "minimal": "v"}  # other heuristics: a square


def plot_progress(points: Sequence[Evaluated], chosen: Evaluated, score: str, path: Path) -> None:
    """Score of every evaluated configuration in order, and the best so far."""
    figure, axes = _figure()
    order = list(range(1, len(points) + 1))
    best = [max(p.score for p in points[:i]) for i in order]
    axes.step(order, best, where="post", color=BLUE, lw=1.8, label="best so far")
    _scatter(axes, list(zip(order, points, strict=True)), chosen, lambda i, p: (i, p.score))
    axes.set(xlabel="evaluated sub-adapters", ylabel=score)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(figure, axes, path)


def plot_pareto(points: Sequence[Evaluated], chosen: Evaluated, score: str, cost: str, path: Path) -> None:
    """Score over cost, with the front of those that no other beats in both."""
    figure, axes = _figure()
    front = pareto_front(points)
    axes.plot([p.cost for p in front], [p.score for p in front], color=BLUE, lw=1.8, label="Pareto front", zorder=1)
    _scatter(axes, list(enumerate(points)), chosen, lambda i, p: (p.cost, p.score))
    axes.set(xlabel=cost, ylabel=score)
    if max(p.cost for p in points) >= 1e4:
        axes.xaxis.set_major_formatter(lambda value, position: f"{value / 1e6:.2f} M")
    _finish(figure, axes, path)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e6ea", lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _scatter(axes: Any, numbered: Sequence[tuple[int, Evaluated]], chosen: Evaluated, place: Any) -> None:
    for kind in dict.fromkeys(p.kind for _, p in numbered):
        xs, ys = zip(*(place(i, p) for i, p in numbered if p.kind == kind), strict=True)
        if kind:
            axes.scatter(xs, ys, marker=MARKERS.get(kind, "s"), color="#1c1e21", s=46, label=kind, zorder=3)
        else:
            axes.scatter(xs, ys, color=GREY, s=22, label="tried", zorder=2)
    at = next(i for i, p in numbered if p.number == chosen.number)
    x, y = place(at, chosen)
    axes.scatter([x], [y], s=170, facecolors="none", edgecolors=ORANGE, linewidths=2.2, label="chosen", zorder=4)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.legend(frameon=False, fontsize=8.5)
    figure.savefig(path)
