"""What a quantization method is. Shape letters: O output features, I input features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from sqft.quantization.grid import Grid
from sqft.sparsity.method import Method


class Quantized(NamedTuple):
    """Integers uint8 [O, I] and the grid that gives them meaning; and, if the method tells, what rounding took away, as
    of ``fractions``: int8 [O, I]."""

    q_OI: Tensor
    grid: Grid
    fractions_OI: Tensor | None = None

    def weight(self) -> Tensor:
        """float32 [O, I]: the de-quantized weight."""
        return self.grid.dequantize(self.q_OI)


class Quantizer(Method):
    """``(w_OI, mask_OI, spec, *, act_order) -> Quantized``, or ``(w_OI, value, mask_OI, spec, *, act_order)``.

    ``mask_OI`` is bool, False where pruned (there the integers have to mean exactly 0), or None. Rows must not depend
    on each other: weights of one input are quantized as one.
    """


def quantizer(needs: Any = None, paper: str = "") -> Callable[[Callable[..., Quantized]], Quantizer]:
    """Makes a function a ``Quantizer``."""
    return lambda function: Quantizer(function, needs, paper)
