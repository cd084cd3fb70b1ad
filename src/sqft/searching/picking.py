"""Which of the tried sub-adapters to take: the best, the knee of the Pareto front, or the smallest that is good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqft.adapters.groups import Ranks
from sqft.errors import UsageError

PICKS = ("best", "knee", "smallest-within")


@dataclass(frozen=True)
class Evaluated:
    """One evaluated configuration: its score (more is better) and cost (less is better)."""

    number: int
    ranks: Ranks
    score: float
    cost: float
    kind: str = ""


def pareto_front(points: Sequence[Evaluated]) -> list[Evaluated]:
    """The points that no other beats in both, by falling cost; of equal ones the first."""
    front: list[Evaluated] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.score, p.number)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front[::-1]


def pick(points: Sequence[Evaluated], how: str) -> Evaluated:
    """One point.

    'best': the highest score, the cheapest of equals. 'knee': the point of the Pareto front that lies farthest above
    the line from its cheapest to its best point, both axes scaled to 1. 'smallest-within N%': the cheapest whose score
    is at most N % below the best one. Raises UsageError for anything else.
    """
    front = pareto_front(points)
    best, cheapest = front[0], front[-1]
    if how == "best":
        return best
    if how == "knee":
        span, rise = best.cost - cheapest.cost or 1, best.score - cheapest.score or 1
        return max(front, key=lambda p: (p.score - cheapest.score) / rise - (p.cost - cheapest.cost) / span)
    share = parse_within(how)
    return min((p for p in front if p.score >= best.score - share * abs(best.score)), key=lambda p: p.cost)


def parse_within(how: str) -> float:
    """'smallest-within 1%' -> 0.01. Raises UsageError for anything else."""
    text = how.removeprefix("smallest-within").strip(" =:")
    try:
        if not how.startswith("smallest-within"):
            raise ValueError
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        raise UsageError(f"'{how}' picks nothing: write best, knee, or smallest-within 1%") from None
    if not 0 <= share < 1:
        raise UsageError(f"'{how}': the share has to lie between 0 % and 100 %")
    return share
