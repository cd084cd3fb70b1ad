"""What a pruning criterion is: a function on tensors that says which statistic it needs.

Shape letters: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Pruned(NamedTuple):
    """Which weights are kept, bool [O, I], and what they are now, [O, I]; None: what they were."""

    mask_OI: Tensor
    w_OI: Tensor | None = None


@dataclass(frozen=True)
class Sparsifier:
    """A registered criterion: ``(w_OI, pattern) -> Pruned`` or, if it needs a statistic, ``(w_OI, value, pattern)``.

    ``needs``: None, or ``ColumnNorms``, ``Hessian`` or ``Gradient`` of ``sqft.calibration.statistics``, whose
    ``value()`` it gets. A weight that is 0.0 was pruned before: whatever the criterion says, it stays so.
    """

    function: Callable[..., Pruned]
    needs: Any
    paper: str

    def __call__(self, *arguments: Any) -> Pruned:
        return self.function(*arguments)


def sparsifier(needs: Any = None, paper: str = "") -> Callable[[Callable[..., Pruned]], Sparsifier]:
    """Makes a function a sparsifier; ``paper`` is its source."""
    return lambda function: Sparsifier(function, needs, paper)
