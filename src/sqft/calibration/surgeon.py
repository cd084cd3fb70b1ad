"""What GPTQ and SparseGPT share: a weight changes column after column, and the columns that are still to come make
good the error of each (Optimal Brain Surgeon, by the Cholesky factor of the inverse Hessian: arXiv 2210.17323, section
3.3, step 3; arXiv 2301.00774, section 3.2).

Shape letters: O output features, I input features. A column of the papers is a row here, so that it is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sqft.calibration.statistics import widest
from sqft.errors import SqftError
from sqft.kernels.dispatch import accumulation_dtype

BLOCK = 128  # columns whose corrections to the rest are applied at once (lazy batch updates)
LARGEST_DAMPING = 10.0
FEW = 32  # rows that are copied at once


def transposed(w_OI: Tensor) -> Tensor:
    """A copy of a weight as ``sweep`` takes it: contiguous [I, O], in float32 (float64 if it is that)."""
    dtype = accumulation_dtype(w_OI.dtype)
    return w_OI.detach().mT.to(dtype, copy=True, memory_format=torch.contiguous_format)


def sweep(w_IO: Tensor, u_II: Tensor, change: Callable[[slice, Tensor], Tensor], step: int = BLOCK) -> None:
    """Changes ``w_IO`` in place, a step of columns after the other, with U upper triangular (of any float dtype).

    ``change(place, u_SS)`` changes a step's columns, with its part of U in w's dtype, as ``kernels.columns`` do, and
    gives their errors [S, O]; the columns after the step are corrected then.
    """
    for start in range(0, len(w_IO), step):
        place = slice(start, min(start + step, len(w_IO)))
        u_SI = u_II[place].to(w_IO.dtype, memory_format=torch.contiguous_format)
        errors = change(place, u_SI[:, place].contiguous())
        w_IO[place.stop :].addmm_(u_SI[:, place.stop :].mT, errors, alpha=-1)


def inverse_factor(h_II: Tensor, damping: float, order_I: Tensor | None = None) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse, with rows and columns in the given order: float64 [I, I],
    in no other memory. ``damping`` of the Hessian's mean is added to the diagonal, ten times as much after a failure;
    raises SqftError if that does not help."""
    order_I = torch.arange(len(h_II), device=h_II.device) if order_I is None else order_I.to(h_II.device)
    # Column after column: as LAPACK has it, which then works in its place.
    work_II = torch.empty_like(h_II, dtype=widest(h_II.device), memory_format=torch.contiguous_format).mT
    diagonal = h_II.diagonal()[order_I].to(work_II.dtype)
    dead = diagonal == 0
    diagonal[dead] = diagonal[~dead].mean() if not dead.all() else 1.0
    mean = float(diagonal.mean())
    diagonal.add_(damping * mean)
    failed = torch.empty((), dtype=torch.int32, device=h_II.device)
    while True:
        for part_I, rows in zip(order_I.split(FEW), work_II.mT.split(FEW), strict=True):  # H is symmetric
            rows.copy_(h_II[part_I][:, order_I])
        work_II.diagonal().copy_(diagonal)
        torch.linalg.cholesky_ex(work_II, out=(work_II, failed))
        if not failed:
            torch.cholesky_inverse(work_II, out=work_II)
            torch.linalg.cholesky_ex(work_II, upper=True, out=(work_II, failed))
            if not failed:
                return work_II
        if damping >= LARGEST_DAMPING or mean != mean:
            raise SqftError("the Hessian of the calibration inputs cannot be factorized: the activations are not "
                            "finite; use --dtype float32, or other calibration text")  # fmt: skip
        diagonal.add_(9 * damping * mean)
        damping *= 10
