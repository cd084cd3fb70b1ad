"""What a quantization method is. Shape letters: O output features, I input features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sqft.quantization.grid import Grid
from sqft.sparsity.method import Method

FRACTION = 256  # parts of a step


class Quantized(NamedTuple):
    """Integers uint8 [O, I] and the grid that gives them meaning; and, if the method tells, what rounding took away, as
    of ``fractions``: int8 [O, I]."""

    q_OI: Tensor
    grid: Grid
    fractions_OI: Tensor | None = None

    def weight(self) -> Tensor:
        """float32 [O, I]: the de-quantized weight."""
        return self.grid.dequantize(self.q_OI)


def fractions(difference: Tensor) -> Tensor:
    """int8: differences of weights in steps of the grid, before less after rounding, in 256ths of a step and less than
    half a step, so that integer plus fraction is exact in float32 and rounds to the integer, never to its neighbour."""
    return difference.mul(FRACTION).round_().clamp_(1 - FRACTION // 2, FRACTION // 2 - 1).to(torch.int8)


class Quantizer(Method):
    """``(w_OI, mask_OI, spec, *, act_order) -> Quantized``, or ``(w_OI, value, mask_OI, spec, *, act_order)``.

    ``mask_OI`` is bool, False where pruned (there the integers have to mean exactly 0), or None. Rows must not depend
    on each other: weights of one input are quantized as one.
    """


def quantizer(needs: Any = None, paper: str = "") -> Callable[[Callable[..., Quantized]], Quantizer]:
    """Makes a function a ``Quantizer``."""
    return lambda function: Quantizer(function, needs, paper)
