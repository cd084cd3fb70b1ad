"""ALPS (arXiv 2406.07831): the mask from ADMM on the layer's least-squares problem.

    min over W, D with W = D, D sparse, of  ||X W^T - X W0^T||^2

Weights are scaled by their inputs' norms, so that H = X^T X has a unit diagonal (section 3.3); with multipliers V and a
penalty r that grows until D's support stands still (eq. 4, and section 3.2's rule):

    W <- (W0 H - V + r D) (H + r)^-1,    D <- the largest of W + V / r,    V <- V + r (W - D)

H is split into eigenvectors once, so that r may change. The kept weights are then solved for on D's support by
conjugate gradients, as ``repair`` does.

Shape letters: O output features, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.calibration.statistics import Hessian, widest
from sqft.kernels.dispatch import accumulation_dtype, product
from sqft.sparsity.method import Pruned, sparsifier
from sqft.sparsity.pattern import Pattern
from sqft.sparsity.repair import repair

DAMPING = 0.01  # of the scaled Hessian's diagonal, which is 1
PENALTY = 0.1  # r at first
EVERY = 3  # iterations with one r
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the kept weights that changed since the last r: factor
MOST = 300  # iterations


@sparsifier(needs=Hessian, paper="arXiv 2406.07831")
def alps(w_OI: Tensor, h_II: Tensor, pattern: Pattern) -> Pruned:
    """The mask, and the kept weights chosen anew.

    Args:
        w_OI: the weight, any float dtype; computed in float32, or in float64 if it is that. What is 0 stays 0.
        h_II: X^T X over the calibration tokens, up to a factor. Weights of an input that was never active go first.
        pattern: a ratio is of each row; or N:M with any M.

    Raises UsageError if M does not divide I.
    """
    dtype = accumulation_dtype(w_OI.dtype)
    norm_I = h_II.diagonal().to(dtype).sqrt()
    scale_I = torch.where(norm_I == 0, 1, norm_I)
    scaled_II = h_II.to(dtype) / scale_I / scale_I[:, None]
    w0 = w_OI.to(dtype) * norm_I
    mask_OI = admm_mask(w0, scaled_II, pattern) & (w_OI != 0)
    pruned_OI = w_OI * mask_OI
    return Pruned(mask_OI, repair(pruned_OI, w_OI, mask_OI, h_II, h_II, damping=DAMPING, lean=0))


def admm_mask(w0_OI: Tensor, h_II: Tensor, pattern: Pattern) -> Tensor:
    """bool [O, I]; both of one dtype, ``h_II`` with a unit diagonal."""
    wide = h_II.to(widest(h_II.device), copy=True)
    wide.diagonal().add_(DAMPING)
    values_I, vectors_II = (v.to(w0_OI.dtype) for v in torch.linalg.eigh(wide))
    wanted_OI = product(w0_OI, wide.to(w0_OI.dtype))
    d, v, r = w0_OI, torch.zeros_like(w0_OI), PENALTY
    mask = pattern.kept(w0_OI.abs())
    kept = int(mask.sum())
    vectors_T = vectors_II.mT.contiguous()
    for _ in range(MOST // EVERY):
        before = mask
        for _ in range(EVERY):
            right = product(wanted_OI - v + r * d, vectors_T) / (values_I + r)  # x Q, Q's columns the vectors
            w = product(right, vectors_II)
            sum_OI = w + v / r
            mask = pattern.kept(sum_OI.abs())
            d = sum_OI * mask
            v = r * (sum_OI - d)
        changed = int((mask ^ before).sum()) / kept
        if changed == 0:
            break
        r *= next(factor for share, factor in GROWTH if changed >= share)
    return mask
