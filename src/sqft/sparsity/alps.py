"""ALPS (arXiv 2406.07831): the mask by ADMM on the layer's reconstruction error, then the kept weights that suit it.

    min over W, D of  ||X W^T - X W0^T||^2,  W = D, D has the pattern

With H = X^T X scaled to a unit diagonal (weights scaled alike), Lagrange multipliers V and a penalty r (section 3.1):

    W <- (W0 H - V + r D) (H + r I)^-1        D <- the largest of W + V / r        V <- V + r (W - D)

H is decomposed once, so that each inverse is two products. r grows while the mask still changes, and when it rests (or
after 300 steps) conjugate gradients find the kept weights (section 3.3).

Shape letters: O output features, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.calibration.statistics import Hessian
from sqft.kernels.dispatch import accumulation_dtype, product
from sqft.sparsity.method import Pruned, sparsifier
from sqft.sparsity.pattern import Pattern
from sqft.sparsity.repair import DAMPING, repair

PENALTY = 0.1  # r at first
EVERY = 3  # steps between two looks at the mask
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # (share of the kept weights that have changed, r's factor)
STEPS = 300


@sparsifier(needs=Hessian, paper="arXiv 2406.07831")
def alps(w_OI: Tensor, h_II: Tensor, pattern: Pattern) -> Pruned:
    """The mask, and the kept weights chosen anew.

    Args:
        w_OI: the weight, any float dtype; computed in float32, or in float64 if it is that. What is 0 stays 0.
        h_II: X^T X over the calibration tokens, up to a factor.
        pattern: how much of each row to keep, or N:M.
    """
    w0 = w_OI.detach().to(accumulation_dtype(w_OI.dtype))
    h = h_II.to(w0.dtype, copy=True)
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    scale_I = h.diagonal().sqrt()
    h /= scale_I[:, None] * scale_I
    values_I, vectors_II = torch.linalg.eigh(h)
    w0 = w0 * scale_I
    target = product(w0, h)
    d, v, penalty = w0.clone(), torch.zeros_like(w0), PENALTY
    pruned_before = w_OI == 0
    mask = torch.ones_like(pruned_before)
    earlier = mask
    for step in range(1, STEPS + 1):
        w = product((target - v).add_(d, alpha=penalty), vectors_II.mT).div_(values_I + penalty)
        w = product(w, vectors_II)
        d = w + v / penalty
        mask = pattern.kept(d.abs().masked_fill_(pruned_before, -1)) & ~pruned_before
        d *= mask
        v += penalty * (w - d)
        if step % EVERY == 0:
            changed = int((mask & ~earlier).sum()) / max(1, int(mask.sum()))
            if not changed:
                break
            penalty *= next(factor for share, factor in GROWTH if changed >= share)
            earlier = mask
    start = (d / scale_I).to(w_OI.dtype)
    return Pruned(mask, repair(start, w_OI, mask, h_II, h_II))
