"""Sub-adapters that need no search: by the name of a heuristic, or from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqft.adapters.groups import Ranks
from sqft.elastic.handle import RECORDS, Elastic, SearchSpace
from sqft.errors import SqftError, UsageError, did_you_mean, shown
from sqft.strict import read_object, read_yaml

Records = Sequence[tuple[Sequence[int], float]]  # of training: each group's choice, and the loss under them
HEURISTICS = ("maximal", "minimal", "median", "most-frequent", "min-loss")
WINDOW = 16  # steps before and after one, whose mean loss its own is compared with


def resolve_ranks(model: Any, choice: str, folder: str | Path = "") -> Ranks:
    """The ranks that ``choice`` names for a live super-adapter: a heuristic, or a YAML or JSON file (group: rank).
    ``folder`` is the super-adapter's, for heuristics that need its training records. Raises UsageError."""
    if not getattr(model, "peft_config", None):
        raise UsageError(f"ranks '{choice}' go with a super-adapter, and this model has no adapter: leave ranks out")
    space = Elastic(model).space
    if choice in HEURISTICS:
        return heuristic(choice, space, read_rank_records(folder) if folder else ())
    path = Path(choice)
    if not path.is_file():
        raise UsageError(f"'{choice}' is neither a file nor one of {', '.join(HEURISTICS)}")
    ranks, lines = read_yaml(path)  # JSON is YAML too
    for name, rank in ranks.items():
        if type(rank) is not int:
            raise UsageError(f"{path}:{lines[name,]}: '{shown(name)}' is {shown(repr(rank))}: write 'group: rank' "
                             "lines, as in the ranks.yaml that a search writes")  # fmt: skip
    return {**heuristic("maximal", space), **ranks}


def read_rank_records(folder: str | Path) -> Records:
    """What training recorded beside an adapter; empty if it did not."""
    path = Path(folder) / RECORDS
    try:
        return _records(read_object(path, data=True)["records"]) if path.is_file() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SqftError(f"{path} is corrupt ({error}): train again") from None


def _records(values: Any) -> Records:
    """Raises ValueError or TypeError."""
    found = [([int(choice) for choice in choices], float(loss)) for choices, loss in values]
    return found


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
