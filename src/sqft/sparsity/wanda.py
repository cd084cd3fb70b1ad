"""Wanda: prune by |weight| x activation norm (arXiv 2306.11695, eq. 1).

Shape letters: O output features, I input features.
"""

from __future__ import annotations

from torch import Tensor

from sqft.calibration.statistics import ColumnNorms
from sqft.sparsity.method import Pruned, sparsifier
from sqft.sparsity.pattern import Pattern


@sparsifier(needs=ColumnNorms, paper="arXiv 2306.11695")
def wanda(w_OI: Tensor, norms_I: Tensor, pattern: Pattern) -> Pruned:
    """Keeps the largest ``S_ij = |W_ij| * ||X_j||_2`` of each output row (or N:M group).

    Args:
        w_OI: weight of a linear layer, any float dtype.
        norms_I: float64 [I], the L2 norm over all calibration tokens of each input feature.
        pattern: how much to keep.
    """
    return Pruned(pattern.kept(w_OI.detach().to(norms_I.dtype).abs() * norms_I))
