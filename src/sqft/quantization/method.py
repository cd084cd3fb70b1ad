"""What a quantization method is: a function on tensors that says which statistic it needs.

Shape letters: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from sqft.quantization.grid import Grid


class Quantized(NamedTuple):
    """Integers uint8 [O, I] and the grid that gives them meaning."""

    q_OI: Tensor
    grid: Grid

    def weight(self) -> Tensor:
        """float32 [O, I]: the de-quantized weight."""
        return self.grid.dequantize(self.q_OI)


@dataclass(frozen=True)
class Quantizer:
    """A registered method: ``(w_OI, mask_OI, spec, *, act_order) -> Quantized`` or, if it needs a statistic,
    ``(w_OI, value, mask_OI, spec, *, act_order)``.

    ``needs``: None, or ``ColumnNorms``, ``Hessian`` or ``Gradient`` of ``sqft.calibration.statistics``, whose
    ``value()`` it gets. Rows must not depend on each other: weights of one input are quantized as one. ``mask_OI`` is
    bool, False where pruned (there the integers have to mean exactly 0), or None.
    """

    function: Callable[..., Quantized]
    needs: Any
    paper: str

    def __call__(self, *arguments: Any, **options: Any) -> Quantized:
        return self.function(*arguments, **options)


def quantizer(needs: Any = None, paper: str = "") -> Callable[[Callable[..., Quantized]], Quantizer]:
    """Makes a function a quantizer; ``paper`` is its source."""
    return lambda function: Quantizer(function, needs, paper)
