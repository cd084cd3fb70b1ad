"""SparseGPT (arXiv 2301.00774): prune column after column, and let the kept weights make good what is lost.

With U the upper Cholesky factor of the inverse Hessian, pruning weight w of column j costs ``(w / U_jj)^2`` (eq. 3) and
moves the row's later columns by ``- w / U_jj * U_j,later`` (section 3.2). Which weights are pruned is decided for 128
columns at a time, over all rows together, or for each group of N:M, when the sweep reaches them, on the weights as they
have been corrected by then ("adaptive mask selection", section 3.3).

Shape letters: O output features, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.calibration.statistics import Hessian
from sqft.calibration.surgeon import BLOCK, inverse_factor, sweep, transposed
from sqft.kernels.columns import one_by_one
from sqft.sparsity.method import Pruned, sparsifier
from sqft.sparsity.pattern import Pattern

DAMPING = 0.01  # of the Hessian's mean diagonal, added to it


@sparsifier(needs=Hessian, paper="arXiv 2301.00774")
def sparsegpt(w_OI: Tensor, h_II: Tensor, pattern: Pattern) -> Pruned:
    """The mask, and the kept weights corrected.

    Args:
        w_OI: the weight, any float dtype; computed in float32, or in float64 if it is that. What is 0 stays 0.
        h_II: X^T X over the calibration tokens, up to a factor. Weights of an input that was never active go first.
        pattern: a ratio is of each block of 128 columns (not of each row), as in the paper; or N:M with any M.

    Raises SqftError if H cannot be factorized even with heavy damping (not-a-number in the inputs), UsageError if M
    does not divide I.
    """
    inputs = w_OI.shape[1]
    if pattern.group:
        pattern.check("a weight", (len(w_OI), inputs))
    w_IO = transposed(w_OI)
    kept_IO = w_IO != 0
    u_II = inverse_factor(h_II, DAMPING)
    importance_I = torch.where(h_II.diagonal() == 0, 0, u_II.diagonal().to(w_IO.dtype).square().reciprocal())
    span = pattern.group or BLOCK

    def choose(j: int) -> Tensor:
        if j % span == 0:
            part = slice(j, min(j + span, inputs))
            score_IO = w_IO[part].square().mul_(importance_I[part, None])
            score_IO.masked_fill_(~kept_IO[part], -1)  # what was pruned before counts among the pruned
            score = score_IO.mT if pattern.group else score_IO.reshape(1, -1)
            chosen = pattern.kept(score)
            kept_IO[part] &= chosen.mT if pattern.group else chosen.view_as(score_IO)
        return w_IO[j] * kept_IO[j]

    def change(place: slice, u_SS: Tensor) -> Tensor:
        return one_by_one(w_IO[place], u_SS, range(len(u_SS)), lambda j: choose(place.start + j))

    sweep(w_IO, u_II, change, span * max(1, BLOCK // span))
    return Pruned(kept_IO.mT.contiguous(), w_IO.mT.to(w_OI.dtype, memory_format=torch.contiguous_format))
