"""Wanda: prune by |weight| x activation norm (arXiv 2306.11695, eq. 1).

Shape letters: O output features, I input features.
"""

from __future__ import annotations

from torch import Tensor

from sqft.sparsity.magnitude import keep_largest


def wanda(w_OI: Tensor, norm_I: Tensor | None, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """Mask bool [O, I] that keeps the largest ``S_ij = |W_ij| * ||X_j||_2`` of each output row (or N:M group).

    Args:
        w_OI: weight of a linear layer, any float dtype.
        norm_I: float64 [I], the L2 norm over all calibration tokens of each input feature.
        sparsity: share of each row to prune.
        pattern: (N, M) instead of a ratio, or None.
    """
    assert norm_I is not None
    return keep_largest(w_OI.detach().double().abs() * norm_I, sparsity, pattern)
