"""Round to nearest: the baseline that GPTQ has to beat. Shape letters: O output features, I input features."""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.kernels.columns import fractions
from sqft.quantization.grid import GridSpec, fit
from sqft.quantization.method import Quantized, quantizer


@quantizer()
def rtn(w_OI: Tensor, mask_OI: Tensor | None, spec: GridSpec, *, act_order: bool = False) -> Quantized:
    """Rounds every weight to the nearest point of its grid; a pruned one becomes exactly 0. No use of ``act_order``."""
    w_OI = w_OI.detach().float()
    if mask_OI is not None:
        w_OI = torch.where(mask_OI, w_OI, 0)
    grid = fit(w_OI, spec)
    q_OI = grid.integers(w_OI)
    scale, zero = (grid.spread(v, w_OI.shape[1]) for v in (grid.scale_OG, grid.zero_OG))
    return Quantized(q_OI, grid, fractions(w_OI.div_(scale).sub_(q_OI).add_(zero)))
