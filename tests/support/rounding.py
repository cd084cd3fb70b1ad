"""How far a product may be from the exact one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def of_16_bits(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """[T, O]: of x w^T when x is rounded to 16 bits in groups of 64 columns, each by at most 2^-16 of its group's largest."""
    groups = F.pad(x_TI.double(), (0, -x_TI.shape[1] % 64)).unflatten(1, (-1, 64)).abs().amax(-1)
    return 2.0**-16 * groups.repeat_interleave(64, 1)[:, : x_TI.shape[1]] @ w_OI.double().abs().mT
