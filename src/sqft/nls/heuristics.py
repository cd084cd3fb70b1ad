"""Sub-adapters that need no search, by name."""

from __future__ import annotations

from collections.abc import Sequence

from sqft.adapters.elastic import Ranks
from sqft.errors import UsageError, did_you_mean
from sqft.nls.space import SearchSpace

Records = Sequence[tuple[Sequence[int], float]]  # of training: each group's choice, and the loss under them
HEURISTICS = ("maximal", "minimal", "median", "most-frequent", "min-loss")
WINDOW = 16  # steps before and after one, whose mean loss its own is compared with


def heuristic(name: str, space: SearchSpace, records: Records = ()) -> Ranks:
    """The sub-adapter of that name.

    'maximal', 'minimal': the largest, smallest ranks. 'median': the middle choice of every group (the paper's
    heuristic; of an even number of choices the smaller middle one). 'most-frequent': the rank of each group that was
    trained most often. 'min-loss': the rank of each group with the least mean training loss while it was active,
    relative to the losses around it (training has seen a whole configuration once at most, but each rank often).

    Raises UsageError for an unknown name, or if the last two have no training records.
    """
    if name in ("maximal", "minimal", "median"):
        place = {"maximal": lambda n: 0, "minimal": lambda n: n - 1, "median": lambda n: n // 2}[name]
        return {group.name: group.choices[place(len(group.choices))] for group in space.groups}
    if name not in HEURISTICS:
        raise UsageError(f"unknown heuristic '{name}': {did_you_mean(name, HEURISTICS)}")
    if not records:
        raise UsageError(f"'{name}' needs the records of training (ranks.json beside the adapter): train with sqft, or "
                         "use median")  # fmt: skip
    excess = _excess([loss for _, loss in records])
    ranks = {}
    for i, group in enumerate(space.groups):
        seen: dict[int, list[float]] = {}
        for (choices, _), value in zip(records, excess, strict=True):
            seen.setdefault(choices[i], []).append(value)
        if name == "most-frequent":
            best = max(seen, key=lambda c: (len(seen[c]), c))
        else:
            best = min(seen, key=lambda c: (sum(seen[c]) / len(seen[c]), -c))
        ranks[group.name] = group.choices[best]
    return ranks


def _excess(losses: Sequence[float]) -> list[float]:
    """Each loss less the mean of those around it: losses fall over training, which says nothing about ranks."""
    excess = []
    for i, loss in enumerate(losses):
        near = losses[max(0, i - WINDOW) : i + WINDOW + 1]
        excess.append(loss - sum(near) / len(near))
    return excess
