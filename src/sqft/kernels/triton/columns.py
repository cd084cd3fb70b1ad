"""GPTQ's inner loop in one launch (K4), where torch takes twelve operations a column: as ``kernels/columns.py`` has it,
for CUDA. A program holds all columns of a step for some output features. Shape letters as there."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# A kernel's parameters are pointers and constants of Triton's, its arguments tensors and numbers.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sqft.kernels import columns as reference
from sqft.kernels.columns import Rounded
from sqft.kernels.triton.tiles import nearest
from sqft.kernels.triton.weights import OPTIONS

BO = 32


@triton.jit
def kernel(w_ptr, u_ptr, scale_ptr, zero_ptr, mask_ptr, q_ptr, f_ptr, e_ptr, S, O, FIRST, LAST, largest,
           MASK: tl.constexpr, PROPAGATE: tl.constexpr, BS: tl.constexpr, BO: tl.constexpr):  # fmt: skip
    s, o = tl.arange(0, BS), tl.program_id(0) * BO + tl.arange(0, BO)
    inside = (s[:, None] < S) & (o[None, :] < O)
    at = w_ptr + s[:, None] * O + o[None, :]
    w = tl.load(at, mask=inside, other=0.0)
    for j in range(FIRST, LAST):
        place = (j - FIRST) * O + o
        scale = tl.load(scale_ptr + place, mask=o < O, other=1.0)
        zero = tl.load(zero_ptr + place, mask=o < O, other=0.0)
        mine = tl.sum(tl.where(s[:, None] == j, w, 0.0), 0)
        units = tl.div_rn(mine, scale)
        q = tl.minimum(tl.maximum(nearest(units) + zero, 0.0), largest)
        fraction = tl.minimum(tl.maximum(nearest((units + zero - q) * 256), -127.0), 127.0)
        if MASK:
            kept = tl.load(mask_ptr + place, mask=o < O, other=0) != 0
            q, fraction = tl.where(kept, q, zero), tl.where(kept, fraction, 0.0)
            if not PROPAGATE:
                mine = tl.where(kept, mine, 0.0)
        tl.store(q_ptr + place, q.to(tl.uint8), mask=o < O)
        tl.store(f_ptr + place, fraction.to(tl.int8), mask=o < O)
        chosen = (q - zero) * scale
        u = tl.load(u_ptr + j * S + s, mask=s < S, other=0.0)
        error = tl.div_rn(mine - chosen, tl.sum(tl.where(s == j, u, 0.0), 0))
        tl.store(e_ptr + place, error, mask=o < O)
        w = tl.where(s[:, None] > j, tl.fma(-u[:, None], error[None, :], w), w)
        w = tl.where(s[:, None] == j, chosen[None, :], w)
    tl.store(at, w, mask=inside)


def round_columns(w_SO: Tensor, u_SS: Tensor, columns: range, scale_CO: Tensor, zero_CO: Tensor,
                  mask_CO: Tensor | None, largest: int, propagate: bool = True) -> Rounded:  # fmt: skip
    """``columns.round_columns``; in float64 that."""
    if w_SO.dtype == torch.float64:
        return reference.round_columns(w_SO, u_SS, columns, scale_CO, zero_CO, mask_CO, largest, propagate)
    found = Rounded(*(torch.empty_like(scale_CO, dtype=dtype) for dtype in (torch.uint8, torch.int8, torch.float32)))
    size, outputs = w_SO.shape
    kernel[(triton.cdiv(outputs, BO),)](
        w_SO, u_SS, scale_CO, zero_CO, w_SO if mask_CO is None else mask_CO, *found, size, outputs, columns.start,
        columns.stop, float(largest), mask_CO is not None, propagate, max(16, triton.next_power_of_2(size)), BO,
        **OPTIONS,
    )  # fmt: skip
    return found
