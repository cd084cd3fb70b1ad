"""Products of the compact form for few tokens (K3): tiles are made of the stored bytes within the product, so that
memory is read at 3.3 bits a weight of INT4 at 50 %, and not at 16. For many tokens the weight is made once for cuBLAS.

``kernels/compact.py`` has the layout and the mathematics. Shape letters: T tokens, O output features, I input features,
B groups of 64 columns.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# A kernel's parameters are pointers and constants of Triton's, its arguments tensors and numbers.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sqft.kernels import compact
from sqft.kernels.compact import WIDTH, CompactWeight

MOST_TOKENS = 64  # beyond them each tile would be made several times
ROWS = 16  # of a program: even a weight of 2048 rows keeps the multiprocessors of an H100 at work
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def group_tile(word, values_ptr, first, bit, BITS: tl.constexpr):
    """One group of each row: its values [O, 64] (integers of BITS bits, floats if that is 0), which of them are stored,
    and where the next group begins. ``first`` [O]: where this one does."""
    stored = ((word[:, None] >> bit[None, :].to(tl.int64)) & 1).to(tl.int32)
    before, count = tl.cumsum(stored, 1) - stored, tl.sum(stored, 1)
    if BITS == 0:
        w = tl.load(values_ptr + first[:, None] + before, mask=stored != 0, other=0.0)
        after = first + count
    else:
        at = before * BITS
        byte = values_ptr + first[:, None] + (at >> 3)
        w = tl.load(byte, mask=stored != 0, other=0).to(tl.int32)
        if 8 % BITS:  # may lie across two bytes
            over = (stored != 0) & ((at & 7) + BITS > 8)
            w |= tl.load(byte + 1, mask=over, other=0).to(tl.int32) << 8
        w = (w >> (at & 7)) & ((1 << BITS) - 1)
        after = first + ((count * BITS + 7) >> 3)
    return w, stored, after


@triton.jit
def compact_kernel(x_ptr, mask_ptr, values_ptr, starts_ptr, scale_ptr, zero_ptr, y_ptr, T, O, I, B, G, GROUP, x_t, x_i,
                   BITS: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, WIDTH: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    o, t, bit = tl.program_id(0) * BO + tl.arange(0, BO), tl.arange(0, BT), tl.arange(0, WIDTH)
    first = tl.load(starts_ptr + o, mask=o < O, other=0)
    total = tl.zeros((BT, BO), dtype=tl.float32)
    for b in range(0, B):
        i = b * WIDTH + bit
        word = tl.load(mask_ptr + o.to(tl.int64) * B + b, mask=o < O, other=0)
        w, stored, first = group_tile(word, values_ptr, first, bit, BITS)
        if BITS > 0:
            place = o[:, None] * G + i[None, :] // GROUP
            level = w - tl.load(zero_ptr + place, mask=stored != 0, other=0).to(tl.int32)
            w = level.to(tl.float32) * tl.load(scale_ptr + place, mask=stored != 0, other=0.0)
            w = tl.where(stored != 0, w, 0.0)
        inside = (t[:, None] < T) & (i[None, :] < I)
        x = tl.load(x_ptr + t[:, None] * x_t + i[None, :] * x_i, mask=inside, other=0.0)
        w = w.to(x.dtype).to(tl.float32)  # as the model computes; of halves TF32 loses nothing
        total = tl.dot(x.to(tl.float32), tl.trans(w), total, input_precision=PRECISION)
    inside = (t[:, None] < T) & (o[None, :] < O)
    tl.store(y_ptr + t[:, None] * O + o[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)


def compact_linear(x_TI: Tensor, weight: CompactWeight) -> Tensor:
    """``compact.linear``, which it leaves many tokens and float64 to; sums in float32."""
    tokens, (rows, groups) = len(x_TI), weight.compact.mask_OB.shape
    if not 0 < tokens <= MOST_TOKENS or x_TI.dtype == torch.float64:
        return compact.linear(x_TI, weight)
    y_TO = torch.empty(tokens, rows, dtype=x_TI.dtype, device=x_TI.device)
    mask_OB, values, inputs, _ = weight.compact
    compact_kernel[(triton.cdiv(rows, ROWS),)](
        x_TI, mask_OB.contiguous(), values, weight.starts, weight.scale_OG, weight.zero_OG, y_TO,
        tokens, rows, inputs, groups, weight.scale_OG.shape[-1], max(weight.group, 1),
        *x_TI.stride(), BITS=weight.compact.bits, BT=max(16, triton.next_power_of_2(tokens)), BO=ROWS, WIDTH=WIDTH,
        PRECISION="ieee" if x_TI.dtype == torch.float32 else "tf32", **OPTIONS,
    )  # fmt: skip
    return y_TO
