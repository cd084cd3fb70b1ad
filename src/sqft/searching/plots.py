"""Two charts of a search: how it went, and score over cost."""

from __future__ import annotations

from collections.abc import Sequence

from sqft.drawing import Chart, Series
from sqft.searching.picking import Evaluated, pareto_front


def plots(trials: Sequence[Evaluated], chosen: int | None, metric: str | None, cost: str | None) -> dict[str, Chart]:
    """'progress' and 'pareto' of the evaluated sub-adapters; ``chosen`` is the number of one; None: unknown."""
    score = "validation log-likelihood a token" if metric == "loss" else "validation accuracy"
    weighed, scale = ("seconds of a forward pass", 1) if cost == "latency" else ("adapter weights, millions", 1e-6)
    best = [(i, max(t.score for t in trials[:i])) for i in range(1, len(trials) + 1)]
    front = sorted((t.cost * scale, t.score) for t in pareto_front(trials))
    on_top = sorted(enumerate(trials, 1), key=lambda pair: pair[1].number == chosen)
    in_order = [_mark(trial, i, trial.number == chosen) for i, trial in on_top]
    over_cost = [_mark(trial, trial.cost * scale, trial.number == chosen) for _, trial in on_top]
    return {
        "progress": Chart("progress of the score", "sub-adapters evaluated", score,
                          [Series(best, 0, "step", key="best so far"), *in_order]),
        "pareto": Chart("score over cost", weighed, score, [Series(front, 0, key="Pareto front"), *over_cost]),
    }  # fmt: skip


def _mark(trial: Evaluated, x: float, chosen: bool) -> Series:
    name = ", ".join([str(trial.kind)] * bool(trial.kind) + ["chosen"] * chosen)
    colour, key = (1, "chosen") if chosen else (3, "") if name else (7, "tried")
    return Series([(x, trial.score)], colour, "dot", f"{name or key}: {trial.score:.5g}", name, key)
