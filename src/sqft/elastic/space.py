"""The space of sub-adapters: how a configuration is written down, how many there are, what one costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sqft.adapters.groups import RankGroup, Ranks
from sqft.errors import UsageError


@dataclass(frozen=True)
class SearchSpace:
    """Rank groups and, for each, how many weights one rank takes: the sum of I + O over its modules.

    ``fixed`` is the number of adapter weights outside the groups, ``itemsize`` the bytes of a weight.
    """

    groups: tuple[RankGroup, ...]
    width: dict[str, int]
    fixed: int = 0
    itemsize: int = 4

    @property
    def size(self) -> int:
        """Number of configurations."""
        return math.prod(len(group.choices) for group in self.groups)

    def encode(self, ranks: Ranks) -> tuple[int, ...]:
        """The index of each group's choice, the largest rank first. Raises UsageError for a rank that is no choice."""
        try:
            return tuple(group.choices.index(ranks[group.name]) for group in self.groups)
        except (KeyError, ValueError):
            raise UsageError(f"{ranks} is not a configuration of this space") from None

    def decode(self, choices: tuple[int, ...]) -> Ranks:
        """Inverse of ``encode``."""
        return {group.name: group.choices[i] for group, i in zip(self.groups, choices, strict=True)}

    def parameters(self, ranks: Ranks) -> int:
        """Weights of the sub-adapter."""
        return self.fixed + sum(self.width[group.name] * ranks[group.name] for group in self.groups)

    def cost(self, ranks: Ranks) -> dict[str, int]:
        """Weights, bytes and FLOPs a token (a multiplication and an addition for each weight) of the sub-adapter."""
        count = self.parameters(ranks)
        return {"parameters": count, "bytes": count * self.itemsize, "flops": 2 * count}
