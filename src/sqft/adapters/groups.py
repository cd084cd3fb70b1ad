"""Elastic rank (NLS, Neural Low-rank adapter Search: Shears, arXiv 2404.10934; SQFT, arXiv 2410.03750, section 3.2).

A super-adapter of rank R holds a sub-adapter for every choice of smaller ranks: the first r rows of A and the first r
columns of B. Modules of one rank group share their rank. The rank is state that somebody sets (``Elastic.set``), never
drawn in a forward: whatever computes the layer again, as gradient checkpointing does, computes the same sub-adapter.
A sub-adapter has the scale of the full rank, alpha / R, or one of its own, alpha / r (``rank_scaling``).

Shape letters: O output features, I input features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqft.errors import UsageError
from sqft.models.discover import match_modules
from sqft.models.tables import ATTENTION_INPUTS
from sqft.models.weights import block_index

Ranks = dict[str, int]  # by the name of a rank group


@dataclass(frozen=True)
class RankGroup:
    """Modules (full names) that share a rank, and its choices, the largest first."""

    name: str
    modules: tuple[str, ...]
    choices: tuple[int, ...]


def make_groups(modules: Sequence[str], specs: Sequence[str], choices: Sequence[int]) -> tuple[RankGroup, ...]:
    """Divides adapted modules into rank groups. Groups never span decoder blocks.

    Args:
        modules: full names, in execution order.
        specs: none: q, k and v of a block share a rank (as in the paper), every other module has its own; 'module':
            every module has its own; 'layer': all of a block share one; or a list of 'NAME+NAME' or 'NAME+NAME=32/16':
            modules of a block that match (names or patterns) share a rank, from choices of their own if given. What no
            spec matches keeps the full rank.
        choices: ranks of groups that name none.

    Raises UsageError for a name that matches no module, or one that two specs match.
    """
    choices = sorted(set(choices), reverse=True)
    taken: dict[str, tuple[str, tuple[int, ...]]] = {}  # module -> label of its group, choices
    if list(specs) == ["layer"]:
        taken = {name: ("all", tuple(choices)) for name in modules}
    elif not specs or list(specs) == ["module"]:
        for name in modules:
            leaf = name.rsplit(".", 1)[-1]
            shared = not specs and leaf in ATTENTION_INPUTS
            taken[name] = ("qkv" if shared else leaf, tuple(choices))
    else:
        for spec in specs:
            label, _, own = spec.partition("=")
            ranks = _parse_ranks(own, spec) if own else tuple(choices)
            for hits in match_modules(label.split("+"), modules, "rank group").values():
                for name in hits:
                    if name in taken and taken[name][0] != label:
                        raise UsageError(f"rank groups '{taken[name][0]}' and '{label}' both match {name}")
                    taken[name] = (label, ranks)
    members: dict[tuple[int, str], list[str]] = {}
    for name in modules:
        if name in taken:
            members.setdefault((block_index(name) or 0, taken[name][0]), []).append(name)
    return tuple(RankGroup(f"{block}.{label}", tuple(names), taken[names[0]][1])
                 for (block, label), names in members.items())  # fmt: skip


def _parse_ranks(text: str, spec: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split("/")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"rank group '{spec}': ranks are numbers greater than 0, e.g. q_proj+k_proj=32/16")
    return tuple(sorted({int(part) for part in parts}, reverse=True))
