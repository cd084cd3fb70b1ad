"""Repair on the mask: the kept weights of a changed layer are chosen anew, so that on the inputs X^ of the changed
model it gives what the dense layer W0 gives on inputs that lean towards the dense model's, X:

    min over W, W = 0 where pruned, of  ||X^ W^T - ((1 - a) X^ + a X) W0^T||^2 + l ||W - W0||^2

With H = X^^T X^ and C = X^T X^ the gradient is W (H + l) - W0 ((1 - a) H + a C + l), restricted to the mask. Rows do
not depend on each other; all are solved at once by conjugate gradients, preconditioned by the diagonal (for a = 0:
ALPS, arXiv 2406.07831, section 3.3). Correcting all of the drift, a = 1, over-fits (``benchmarks/bench_quality.py``).

Shape letters: O output features, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.kernels.dispatch import accumulation_dtype, product

DAMPING = 0.1  # l, of H's mean diagonal
LEAN = 0.25  # a
ITERATIONS = 20


def repair(w_OI: Tensor, dense_OI: Tensor, mask_OI: Tensor | None, h_II: Tensor, c_II: Tensor,
           iterations: int = ITERATIONS, damping: float = DAMPING, lean: float = LEAN) -> Tensor:  # fmt: skip
    """The repaired weight [O, I], in ``w_OI``'s dtype; what the mask prunes is 0.

    Args:
        w_OI: where to start: the pruned weight.
        dense_OI: W0. Both of any float dtype; computed in float32, or in float64 if they are that.
        mask_OI: bool, False where pruned; None: nothing is.
        h_II, c_II: X^^T X^ and X^T X^ over the calibration tokens.
    """
    dtype = accumulation_dtype(w_OI.dtype)
    mask_OI = torch.ones_like(w_OI, dtype=torch.bool) if mask_OI is None else mask_OI
    w, w0, h, target_II = (v.to(dtype, copy=True) for v in (w_OI, dense_OI, h_II, h_II))
    target_II.lerp_(c_II.to(dtype), lean)
    damp = damping * h.diagonal().mean()
    for matrix in (h, target_II):
        matrix.diagonal().add_(damp)
    diagonal_I = h.diagonal()
    r = product(w0, target_II.mT).sub_(product(w, h)).mul_(mask_OI)
    p = z = r / diagonal_I
    rz = (r * z).sum(1, keepdim=True)
    for _ in range(iterations):
        hp = product(p, h).mul_(mask_OI)
        step = rz / (p * hp).sum(1, keepdim=True).clamp_min(1e-30)
        w += step * p
        r -= step * hp
        z = r / diagonal_I
        before, rz = rz, (r * z).sum(1, keepdim=True)
        p = z + rz / before.clamp_min(1e-30) * p
    return w.mul_(mask_OI).to(w_OI.dtype)
