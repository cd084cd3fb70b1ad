"""GPTQ (arXiv 2210.17323) that keeps the zeros of a pruned weight, and GPTAQ (arXiv 2504.02692), which also aims at the
outputs of the model as it was before anything was quantized.

With U the upper Cholesky factor of the inverse of the inputs' Hessian ``H = X^T X`` (section 3.3, step 3), rounding
column j to q_j changes the later columns, which make good its error, by ``- (w_j - q_j) / U_jj * U_j,later``.

A pruned weight is "rounded" to exactly 0, whatever corrections it has received: they are passed on as its error to
the columns after it, as SparseGPT (arXiv 2301.00774, section 3) does with a weight that it prunes. Dropping them
leaves a larger error of the outputs (``tests/oracles/test_gptq.py``; perplexity: ``benchmarks/bench_quantize.py``).

In GPTAQ the inputs X^ of the quantized model have drifted from the un-quantized one's, X, so that column j leaves
``(X_j - X^_j) w_j`` of the outputs too. The later columns make that good by ``+ w_j P_j,later``, with H of X^ and

    P = a striu((X - X^)^T X^ U^T) U

Here w_j is the weight that is given, whose outputs on X are the aim, and not, as in the paper's loop, what corrections
(which are for X^) have made of it by then: so all of it is one product before the loop, and nothing comes of a pruned
weight. a is that of repair (``sparsity/repair.py``).

What rounding takes away of a column as it is when it is reached, corrections included, is told as its fractions: with
them a weight's t = integer + fraction is where training can start from without a dead zone.

Shape letters: O output features, I input features, S columns a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.calibration.statistics import Hessian, Products
from sqft.calibration.surgeon import BLOCK, inverse_factor, sweep, transposed
from sqft.kernels.dispatch import kernel, product
from sqft.quantization.grid import Grid, GridSpec, fit
from sqft.quantization.method import Quantized, quantizer

DAMPING = 0.05  # of the Hessian's mean diagonal, added to it
LEAN = 0.25  # a, of GPTAQ


@quantizer(needs=Hessian, paper="arXiv 2210.17323")
def gptq(w_OI: Tensor, h_II: Tensor, mask_OI: Tensor | None, spec: GridSpec, *, act_order: bool = False,
         propagate: bool = True) -> Quantized:  # fmt: skip
    """Quantizes one weight.

    Args:
        w_OI: the weight, any float dtype; computed in float32, or in float64 if it is that.
        h_II: X^T X over the calibration tokens, up to a factor. An input that was never active is merely rounded.
        mask_OI: bool, False where pruned: these end exactly at 0. None: no weight is pruned.
        spec: the grid that is asked for. Scales of a group are fitted when the group is reached, on the corrected
            weights; with ``act_order`` before, on the original ones, so that groups stay contiguous ("static groups").
            A search for clipped ranges weighs errors by H: its diagonal ("mse") or the group's block ("hessian").
        act_order: take columns in the order of falling diagonal of H instead of from left to right.
        propagate: hand the corrections that a pruned weight received to later columns, instead of dropping them.

    Raises SqftError if H cannot be factorized even with heavy damping (not-a-number in the inputs).
    """
    return _rounded(w_OI, h_II, None, mask_OI, spec, act_order, propagate)


@quantizer(needs=Products, paper="arXiv 2504.02692")
def gptaq(w_OI: Tensor, products: tuple[Tensor, Tensor], mask_OI: Tensor | None, spec: GridSpec, *,
          act_order: bool = False, propagate: bool = True, lean: float = LEAN) -> Quantized:  # fmt: skip
    """Quantizes one weight as ``gptq`` does, towards the outputs of the un-quantized model.

    Args:
        products: X^^T X^ and X^T X^ over the calibration tokens, of the quantized model's and the un-quantized one's
            inputs, up to a factor. If the two are equal the result is ``gptq``'s, bit for bit.
        lean: how much of the drift is made good, from 0 to 1.

    The others, and errors, are those of ``gptq``.
    """
    h_II, c_II = products
    return _rounded(w_OI, h_II, (c_II - h_II).mul_(lean), mask_OI, spec, act_order, propagate)


def _rounded(w_OI: Tensor, h_II: Tensor, drift_II: Tensor | None, mask_OI: Tensor | None, spec: GridSpec,
             act_order: bool, propagate: bool) -> Quantized:  # fmt: skip
    """``gptq``, with ``drift_II``, the part of (X - X^)^T X^ to make good, as ``gptaq``."""
    rows, inputs = w_OI.shape
    size = spec.columns(inputs)
    w_IO = transposed(w_OI)
    mask_IO = None if mask_OI is None else mask_OI.mT.contiguous()
    if mask_IO is not None:
        w_IO = torch.where(mask_IO, w_IO, 0)
    scale_GO, zero_GO = (w_IO.new_empty(inputs // size, rows) for _ in range(2))
    static = act_order or size == inputs
    if static:
        grid = fit(w_IO.mT, spec, h_II)
        scale_GO, zero_GO = (v.mT.to(w_IO.dtype).contiguous() for v in (grid.scale_OG, grid.zero_OG))
    order = h_II.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(inputs)
    u_II = inverse_factor(h_II, DAMPING, order)
    w_IO = w_IO[order]
    if drift_II is not None:
        factor_II = u_II.to(w_IO.dtype, memory_format=torch.contiguous_format)
        p_II = product(product(drift_II[order[:, None], order].to(w_IO.dtype), factor_II).triu_(1), factor_II.mT)
        del factor_II
        w_IO += product(p_II.mT, w_IO.mT)
    q_IO, fractions_IO = (torch.empty_like(w_IO, dtype=dtype) for dtype in (torch.uint8, torch.int8))
    rounded = kernel("round_columns", w_IO.device.type)

    def change(place: slice, u_SS: Tensor) -> Tensor:
        errors = []
        for first in range(place.start, place.stop, len(u_SS) if static else size):
            last = place.stop if static else first + size
            if not static:
                grid = fit(w_IO[first:last].mT, spec, h_II[first:last, first:last])
                scale_GO[first // size], zero_GO[first // size] = grid.scale_OG[:, 0], grid.zero_OG[:, 0]
            at, columns = order[first:last], range(first - place.start, last - place.start)
            mask_CO = None if mask_IO is None else mask_IO[at]
            q_IO[at], fractions_IO[at], error = rounded(
                w_IO[place], u_SS, columns, scale_GO[at // size], zero_GO[at // size], mask_CO, spec.largest, propagate
            )
            errors.append(error)
        return torch.cat(errors)

    # A group never straddles two steps.
    sweep(w_IO, u_II, change, BLOCK if static or BLOCK % size == 0 else size)
    found = Grid(spec.bits, scale_GO.mT.half(), zero_GO.mT.to(torch.uint8))
    return Quantized(q_IO.mT.contiguous(), found, fractions_IO.mT)
