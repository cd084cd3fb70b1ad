"""Two charts of a search: how it went, and score over cost."""

from __future__ import annotations

from collections.abc import Sequence

from sqft.drawing import Chart, Curve, Mark, make_axis
from sqft.searching.picking import Evaluated, pareto_front


def plots(trials: Sequence[Evaluated], chosen: int | None, metric: str, cost: str) -> dict[str, Chart]:
    """'progress' and 'pareto' of the evaluated sub-adapters; ``chosen`` is the number of one, or None if unknown."""
    score = "validation log-likelihood a token" if metric == "loss" else "validation accuracy"
    weighed = "seconds of a forward pass" if cost == "latency" else "adapter weights"
    y = make_axis(score, [t.score for t in trials], margin=0.15)
    order = {t.number: i + 1.0 for i, t in enumerate(trials)}
    best = [(i + 1.0, max(t.score for t in trials[: i + 1])) for i in range(len(trials))]
    front = sorted((t.cost, t.score) for t in pareto_front(trials))

    def marks(xs: dict[int, float]) -> list[Mark]:
        shown = [Mark(str(t.kind), xs[t.number], t.score, 3 if t.kind else 7, f"{t.kind or 'tried'}: {t.score:.5g}")
                 for t in trials]  # fmt: skip
        rings = [Mark("", xs[t.number], t.score, 1, f"chosen: {t.score:.5g}", None, "ring")
                 for t in trials if t.number == chosen]  # fmt: skip
        return shown + rings

    def keys(line: str) -> list[tuple[str, str]]:
        return [("c0", line), ("c7", "tried"), ("ring c1", "chosen")]

    costs = {t.number: t.cost for t in trials}
    return {
        "progress": Chart("score of each sub-adapter in order",
                          make_axis("sub-adapters evaluated", [1, len(trials)], margin=0.05, whole=True), y,
                          [Curve(best, 0, "step")], marks(order), keys=keys("best so far")),
        "pareto": Chart("score over cost", make_axis(weighed, [t.cost for t in trials], margin=0.12), y,
                        [Curve(front, 0)], marks(costs), keys=keys("Pareto front")),
    }  # fmt: skip
