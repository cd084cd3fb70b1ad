"""GPTQ (arXiv 2210.17323) that keeps the zeros of a pruned weight.

Columns are rounded one after the other; the error of each is made good by the columns that are still to come, by the
inverse of the Hessian ``H = X^T X`` of the layer's inputs. With U the upper Cholesky factor of H^-1 (section 3.3,
step 3), rounding column j to q_j changes the later columns by ``- (w_j - q_j) / U_jj * U_j,later``.

A pruned weight is "rounded" to exactly 0, whatever corrections it has received: they are passed on as its error to
the columns after it, as SparseGPT (arXiv 2301.00774, section 3) does with a weight that it prunes. Dropping them
instead leaves a larger error of the layer's outputs (``tests/oracles/test_gptq.py``); what it does to perplexity,
``benchmarks/bench_quantize.py`` prints.

Shape letters: O output features, I input features, S columns a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.errors import SqftError
from sqft.kernels.dispatch import accumulation_dtype
from sqft.quantization.grid import Grid, GridSpec, fit
from sqft.quantization.rtn import Quantized

BLOCK = 128  # columns whose corrections to the rest are applied at once (the paper's lazy batch updates)
DAMPING = 0.05  # of the Hessian's mean diagonal, added to it; ten times as much after each failure
LARGEST_DAMPING = 10.0


def gptq(w_OI: Tensor, h_II: Tensor, mask_OI: Tensor | None, spec: GridSpec, *, act_order: bool = False,
         propagate: bool = True) -> Quantized:  # fmt: skip
    """Quantizes one weight.

    Args:
        w_OI: the weight, any float dtype; computed in float32, or in float64 if it is that.
        h_II: X^T X over the calibration tokens, up to a factor. An input that was never active is merely rounded.
        mask_OI: bool, False where pruned: these end exactly at 0. None: no weight is pruned.
        spec: the grid that is asked for. Scales of a group are fitted when the group is reached, on the corrected
            weights; with ``act_order`` before, on the original ones, so that groups stay contiguous ("static groups").
            A search for clipped ranges weighs errors by the Hessian's diagonal.
        act_order: take columns in the order of falling diagonal of H instead of from left to right.
        propagate: hand the corrections that a pruned weight received to later columns, instead of dropping them.

    Raises SqftError if H cannot be factorized even with heavy damping (not-a-number in the inputs).
    """
    rows, inputs = w_OI.shape
    size = spec.columns(inputs)
    # A column of the paper is a row here, so that it is contiguous.
    w_IO = w_OI.detach().to(accumulation_dtype(w_OI.dtype)).mT.contiguous()
    mask_IO = None if mask_OI is None else mask_OI.mT.contiguous()
    if mask_IO is not None:
        w_IO = torch.where(mask_IO, w_IO, 0)
    scale_GO, zero_GO = (w_IO.new_empty(inputs // size, rows) for _ in range(2))
    importance_I = h_II.diagonal()  # a column's error counts in the output by the square of its input
    static = act_order or size == inputs
    if static:
        _set(scale_GO, zero_GO, fit(w_IO.mT, spec, importance_I))
    order = h_II.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(inputs)
    u_II = inverse_factor(h_II[order[:, None], order]).to(w_IO.dtype)
    w_IO = w_IO[order]
    q_IO = torch.empty_like(w_IO)
    columns, diagonal = order.tolist(), u_II.diagonal().tolist()
    step = BLOCK if static or BLOCK % size == 0 else size  # a group never straddles two steps
    for start in range(0, inputs, step):
        end = min(start + step, inputs)
        errors = torch.empty_like(w_IO[start:end])
        for j in range(start, end):
            column, group = columns[j], columns[j] // size
            if not static and j % size == 0:
                _set(
                    scale_GO[group : group + 1],
                    zero_GO[group : group + 1],
                    fit(w_IO[j : j + size].mT, spec, importance_I[j : j + size]),
                )
            scale, zero = scale_GO[group], zero_GO[group]
            q = (w_IO[j] / scale).round_().add_(zero).clamp_(0, spec.largest)
            if mask_IO is not None:
                q = torch.where(mask_IO[column], q, zero)
            q_IO[column] = q
            error = torch.sub(w_IO[j], q.sub_(zero).mul_(scale), out=errors[j - start]).div_(diagonal[j])
            if mask_IO is not None and not propagate:
                error.mul_(mask_IO[column])
            w_IO[j + 1 : end].addr_(u_II[j, j + 1 : end], error, alpha=-1)
        w_IO[end:].addmm_(u_II[start:end, end:].mT, errors, alpha=-1)
    grid = Grid(spec.bits, scale_GO.mT.half(), zero_GO.mT.to(torch.uint8))
    return Quantized(q_IO.mT.contiguous().to(torch.uint8), grid)


def _set(scale_GO: Tensor, zero_GO: Tensor, grid: Grid) -> None:
    scale_GO.copy_(grid.scale_OG.mT)
    zero_GO.copy_(grid.zero_OG.mT)


def inverse_factor(h_II: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse, float64 [I, I]; with few copies, they are large."""
    h_II = h_II.to(torch.float64, copy=True)
    diagonal = h_II.diagonal()
    dead = diagonal == 0
    diagonal[dead] = diagonal[~dead].mean() if not dead.all() else 1.0
    mean, damping = float(diagonal.mean()), DAMPING
    diagonal.add_(damping * mean)
    work_II = torch.empty_like(h_II)
    failed = torch.empty((), dtype=torch.int32, device=h_II.device)
    while True:
        torch.linalg.cholesky_ex(h_II, out=(work_II, failed))
        if not failed:
            torch.linalg.cholesky_ex(torch.cholesky_inverse(work_II), upper=True, out=(work_II, failed))
            if not failed:
                return work_II
        if damping >= LARGEST_DAMPING or mean != mean:
            raise SqftError("the Hessian of the calibration inputs cannot be factorized: the activations are not "
                            "finite; use --dtype float32, or other calibration text")  # fmt: skip
        diagonal.add_(9 * damping * mean)
        damping *= 10
