"""What a method is: a function on tensors that says which statistic it needs. Here, a pruning criterion.

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
class Method:
    """A function, the statistic of ``calibration/statistics.py`` that it ``needs`` (or None), whose ``value()`` is then
    its second argument, and the ``paper`` that it is from."""

    function: Callable[..., Any]
    needs: Any = None
    paper: str = ""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.function(*arguments, **options)


class Sparsifier(Method):
    """``(w_OI, pattern) -> Pruned``, or ``(w_OI, value, pattern)``."""


def sparsifier(needs: Any = None, paper: str = "") -> Callable[[Callable[..., Pruned]], Sparsifier]:
    """Makes a function a ``Sparsifier``."""
    return lambda function: Sparsifier(function, needs, paper)
