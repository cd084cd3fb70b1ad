"""The gradients of A and B in one pass over G = dY^T X (K2): masked, and where the weight is on a grid gated by its
clamp, before they are contracted. As ``kernels/reference.py`` has it, for CUDA.

A program walks a part of a strip of rows: dB of the strip stays in registers, dA is written once a strip. What several
programs have of the same sum is added in a fixed order, so results do not change from run to run.

Shape letters: T tokens, O output features, I input features, R rank, S strips of rows, C parts of a strip.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# A kernel's parameters are pointers and constants of Triton's, its arguments tensors and numbers.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sqft.kernels import reference
from sqft.kernels.dispatch import product
from sqft.kernels.packed import Packed
from sqft.kernels.reference import Adapter
from sqft.kernels.triton.tiles import grid_tile, kept, nearest
from sqft.kernels.triton.weights import OPTIONS, TILE, factors, grid_arguments

PARTS = 8  # of a strip: enough programs for a GPU
MOST_RANK = 64  # that a program holds


@triton.jit
def contract(g, a_ptr, b_ptr, da_ptr, o, i, r, O, I, R, a_r, a_i, b_o, b_r, db, PRECISION: tl.constexpr):
    """A tile's part of dB, added to ``db``, and of dA, written: [R, I] from ``da_ptr`` on."""
    a = tl.load(a_ptr + r[:, None] * a_r + i[None, :] * a_i, mask=(r[:, None] < R) & (i[None, :] < I), other=0.0)
    b = tl.load(b_ptr + o[:, None] * b_o + r[None, :] * b_r, mask=(o[:, None] < O) & (r[None, :] < R), other=0.0)
    da = tl.dot(tl.trans(b.to(tl.float32)), g, input_precision=PRECISION)
    tl.store(da_ptr + r[:, None] * I + i[None, :], da, mask=(r[:, None] < R) & (i[None, :] < I))
    return tl.dot(g, tl.trans(a.to(tl.float32)), db, input_precision=PRECISION)


@triton.jit
def float_kernel(g_ptr, mask_ptr, a_ptr, b_ptr, da_ptr, db_ptr, O, I, P, R, a_r, a_i, b_o, b_r, WIDTH,
                 PRECISION: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    strip, part = tl.program_id(0), tl.program_id(1)
    o, r = strip * BO + tl.arange(0, BO), tl.program_id(2) * BR + tl.arange(0, BR)
    db = tl.zeros((BO, BR), dtype=tl.float32)
    for first in range(part * WIDTH, min((part + 1) * WIDTH, I), BI):
        i = first + tl.arange(0, BI)
        inside = (o[:, None] < O) & (i[None, :] < I)
        g = tl.load(g_ptr + o[:, None] * I + i[None, :], mask=inside, other=0.0).to(tl.float32)
        g *= kept(mask_ptr, o, i, O, I, P).to(tl.float32)
        db = contract(g, a_ptr, b_ptr, da_ptr + strip * R * I, o, i, r, O, I, R, a_r, a_i, b_o, b_r, db, PRECISION)
    tl.store(db_ptr + part * O * R + o[:, None] * R + r[None, :], db, mask=(o[:, None] < O) & (r[None, :] < R))


@triton.jit
def grid_kernel(g_ptr, q_ptr, z_ptr, group_ptr, scale_ptr, own_ptr, ratio_ptr, f_ptr, w_ptr, mask_ptr, a_ptr, b_ptr,
                da_ptr, db_ptr, out_ptr, s, O, I, P, R, G_SIZE, Z_WORDS, w_o, w_i, a_r, a_i, b_o, b_r, out_o, out_i,
                WIDTH, BITS: tl.constexpr, G_IDX: tl.constexpr, RATIO: tl.constexpr, FRACTIONS: tl.constexpr,
                BASE: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
                BR: tl.constexpr):  # fmt: skip
    strip, part = tl.program_id(0), tl.program_id(1)
    o, r = strip * BO + tl.arange(0, BO), tl.program_id(2) * BR + tl.arange(0, BR)
    db = tl.zeros((BO, BR), dtype=tl.float32)
    for first in range(part * WIDTH, min((part + 1) * WIDTH, I), BI):
        i = first + tl.arange(0, BI)
        inside = (o[:, None] < O) & (i[None, :] < I)
        t, low, scale, keep = grid_tile(q_ptr, z_ptr, group_ptr, scale_ptr, own_ptr, ratio_ptr, f_ptr, w_ptr, mask_ptr,
                                        a_ptr, b_ptr, s, o, i, O, I, P, R, G_SIZE, Z_WORDS, w_o, w_i, a_r, a_i, b_o,
                                        b_r, BITS, G_IDX, RATIO, FRACTIONS, BASE, STEPS)  # fmt: skip
        rounded = nearest(t)
        clamped = tl.minimum(tl.maximum(rounded, low), low + ((1 << BITS) - 1))
        if tl.program_id(2) == 0:
            w = (clamped * scale).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + o[:, None] * out_o + i[None, :] * out_i, w, mask=inside)
        g = tl.load(g_ptr + o[:, None] * I + i[None, :], mask=inside, other=0.0).to(tl.float32)
        g *= tl.where(rounded == clamped, keep.to(tl.float32), 0.0)
        if STEPS:
            g = g * scale
        db = contract(g, a_ptr, b_ptr, da_ptr + strip * R * I, o, i, r, O, I, R, a_r, a_i, b_o, b_r, db, PRECISION)
    tl.store(db_ptr + part * O * R + o[:, None] * R + r[None, :], db, mask=(o[:, None] < O) & (r[None, :] < R))


class _Sums:
    """Room for the programs' sums, the launch grid and what depends on sizes alone."""

    def __init__(self, adapter: Adapter, dtype: torch.dtype) -> None:
        outputs, inputs, rank = adapter.b_OR.shape[0], adapter.a_RI.shape[1], adapter.a_RI.shape[0]
        strips, tiles = triton.cdiv(outputs, TILE["BO"]), triton.cdiv(inputs, TILE["BI"])
        self.width = triton.cdiv(tiles, PARTS) * TILE["BI"]
        parts, block = triton.cdiv(inputs, self.width), min(MOST_RANK, max(16, triton.next_power_of_2(rank)))
        new: Any = adapter.b_OR.new_empty
        self.da_SRI = new(strips, rank, inputs, dtype=torch.float32)
        self.db_COR = new(parts, outputs, rank, dtype=torch.float32)
        self.grid = (strips, parts, triton.cdiv(rank, block))
        # G is rounded to half precision where dY is: more than TF32 keeps would be lost on it.
        self.ways = {"PRECISION": "ieee" if dtype == torch.float32 else "tf32", "BR": block, **TILE, **OPTIONS}

    def gradients(self, scale: float) -> tuple[Tensor, Tensor]:
        """dA and dB, float32."""
        return self.da_SRI.sum(0).mul_(scale), self.db_COR.sum(0).mul_(scale)


def masked_gradients(dy_TO: Tensor, x_TI: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """``reference.masked_gradients``; in float64 that."""
    if dy_TO.dtype == torch.float64:
        return reference.masked_gradients(dy_TO, x_TI, adapter)
    sums = _Sums(adapter, dy_TO.dtype)
    g_OI = product(dy_TO.mT, x_TI.mT).contiguous()
    float_kernel[sums.grid](
        g_OI, adapter.mask_OP, adapter.a_RI, adapter.b_OR, sums.da_SRI, sums.db_COR, *g_OI.shape,
        adapter.mask_OP.shape[1], len(adapter.a_RI), *factors(adapter), sums.width, **sums.ways,
    )  # fmt: skip
    da_RI, db_OR = sums.gradients(adapter.scale)
    return da_RI.to(adapter.a_RI.dtype), db_OR.to(adapter.b_OR.dtype)


def quant_aware_gradients(dy_TO: Tensor, x_TI: Tensor, packed: Packed,
                          adapter: Adapter) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """``reference.quant_aware_gradients``; in float64, and where scales are learnt, that."""
    if dy_TO.dtype == torch.float64 or adapter.new_scales is not None:
        return reference.quant_aware_gradients(dy_TO, x_TI, packed, adapter)
    sums = _Sums(adapter, dy_TO.dtype)
    g_OI = product(dy_TO.mT, x_TI.mT).contiguous()
    tensors, sizes, ways = grid_arguments(packed, adapter)
    w_OI = reference.empty_IO(adapter, x_TI.dtype).mT
    grid_kernel[sums.grid](
        g_OI, *tensors, sums.da_SRI, sums.db_COR, w_OI, float(adapter.scale), *g_OI.shape, *sizes, *w_OI.stride(),
        sums.width, **ways, **sums.ways,
    )  # fmt: skip
    return *sums.gradients(adapter.scale), None, w_OI
