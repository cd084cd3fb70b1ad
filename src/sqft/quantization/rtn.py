"""Round to nearest: the baseline that GPTQ has to beat. Shape letters: O output features, I input features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sqft.quantization.grid import Grid, GridSpec, fit


class Quantized(NamedTuple):
    """Integers uint8 [O, I] and the grid that gives them meaning."""

    q_OI: Tensor
    grid: Grid

    def weight(self) -> Tensor:
        """float32 [O, I]: the de-quantized weight."""
        return self.grid.dequantize(self.q_OI)


def rtn(w_OI: Tensor, h_II: Tensor | None, mask_OI: Tensor | None, spec: GridSpec, *,
        act_order: bool = False) -> Quantized:  # fmt: skip
    """Rounds every weight to the nearest point of its grid; a pruned one becomes exactly 0.

    ``h_II`` and ``act_order`` are not used.
    """
    w_OI = w_OI.detach().float()
    if mask_OI is not None:
        w_OI = torch.where(mask_OI, w_OI, 0)
    grid = fit(w_OI, spec)
    return Quantized(grid.integers(w_OI), grid)
