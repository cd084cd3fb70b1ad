"""The adapted weight in one pass over memory (K1): as ``kernels/reference.py`` has it, for CUDA.

A weight is built at 4.1 bytes a weight from a bfloat16 base, and at 2.7 from INT4, where torch's operations move ten
times as much; cuBLAS then multiplies with it. Shape letters: O output features, I input features, R rank, G groups.
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
from sqft.kernels.packed import Packed
from sqft.kernels.reference import Adapter, grid_scales
from sqft.kernels.triton.tiles import float_tile, grid_tile, levels, nearest

TILE = {"BO": 64, "BI": 32}
# Products and sums are fused where the code says so and nowhere else, or two kernels could build other bits.
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def float_kernel(w_ptr, mask_ptr, a_ptr, b_ptr, out_ptr, scale, O, I, P, R, w_o, w_i, a_r, a_i, b_o, b_r,
                 BASE: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    o, i = tl.program_id(0) * BO + tl.arange(0, BO), tl.program_id(1) * BI + tl.arange(0, BI)
    w = float_tile(w_ptr, mask_ptr, a_ptr, b_ptr, scale, o, i, O, I, P, R, w_o, w_i, a_r, a_i, b_o, b_r, BASE)
    inside = (o[:, None] < O) & (i[None, :] < I)
    tl.store(out_ptr + o[:, None] * I + i[None, :], w.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def integer_kernel(q_ptr, z_ptr, group_ptr, scale_ptr, out_ptr, O, I, G_SIZE, Z_WORDS, BITS: tl.constexpr,
                   G_IDX: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    o, i = tl.program_id(0) * BO + tl.arange(0, BO), tl.program_id(1) * BI + tl.arange(0, BI)
    level, _, place = levels(q_ptr, z_ptr, group_ptr, o, i, O, I, G_SIZE, Z_WORDS, BITS, G_IDX)
    inside = (o[:, None] < O) & (i[None, :] < I)
    w = level.to(tl.float32) * tl.load(scale_ptr + place, mask=inside, other=1.0).to(tl.float32)
    tl.store(out_ptr + i[None, :] * O + o[:, None], w.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def grid_kernel(q_ptr, z_ptr, group_ptr, scale_ptr, own_ptr, ratio_ptr, f_ptr, w_ptr, mask_ptr, a_ptr, b_ptr, out_ptr,
                s, O, I, P, R, G_SIZE, Z_WORDS, w_o, w_i, a_r, a_i, b_o, b_r, out_o, out_i, BITS: tl.constexpr,
                G_IDX: tl.constexpr, RATIO: tl.constexpr, FRACTIONS: tl.constexpr, BASE: tl.constexpr,
                STEPS: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    o, i = tl.program_id(0) * BO + tl.arange(0, BO), tl.program_id(1) * BI + tl.arange(0, BI)
    t, low, scale, _ = grid_tile(q_ptr, z_ptr, group_ptr, scale_ptr, own_ptr, ratio_ptr, f_ptr, w_ptr, mask_ptr, a_ptr,
                                 b_ptr, s, o, i, O, I, P, R, G_SIZE, Z_WORDS, w_o, w_i, a_r, a_i, b_o, b_r, BITS, G_IDX,
                                 RATIO, FRACTIONS, BASE, STEPS)  # fmt: skip
    w = tl.minimum(tl.maximum(nearest(t), low), low + ((1 << BITS) - 1)) * scale
    inside = (o[:, None] < O) & (i[None, :] < I)
    tl.store(out_ptr + o[:, None] * out_o + i[None, :] * out_i, w.to(out_ptr.dtype.element_ty), mask=inside)


def blocks(outputs: int, inputs: int) -> tuple[int, int]:
    """The launch grid of one program a tile."""
    return triton.cdiv(outputs, TILE["BO"]), triton.cdiv(inputs, TILE["BI"])


def factors(adapter: Adapter) -> tuple[Any, ...]:
    """R and the strides of A and B: an elastic adapter's are slices."""
    return (*adapter.a_RI.stride(), *adapter.b_OR.stride())


def grid_arguments(packed: Packed, adapter: Adapter) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """What ``grid_tile`` takes: its tensors, its sizes and strides from P on, and which of its ways it goes."""
    scales_GO = grid_scales(packed, adapter).contiguous()
    own_GO = 1 / (packed.scales if adapter.in_steps else scales_GO).float()
    moved = adapter.new_scales is not None and not adapter.in_steps and adapter.base is None
    ratio_GO = packed.scales.float() / scales_GO.float() if moved else own_GO
    base = adapter.mask_OP if adapter.base is None else adapter.base
    other = packed.qweight  # in the place of what there is not
    tensors = (packed.qweight.contiguous(), packed.qzeros, other if packed.g_idx is None else packed.g_idx, scales_GO,
               own_GO.contiguous(), ratio_GO.contiguous(), other if adapter.fractions is None else adapter.fractions,
               base, adapter.mask_OP, adapter.a_RI, adapter.b_OR)  # fmt: skip
    inputs = adapter.a_RI.shape[1]
    sizes = (adapter.mask_OP.shape[1], adapter.a_RI.shape[0], inputs // len(packed.scales), packed.qzeros.shape[1],
             *base.stride(), *factors(adapter))  # fmt: skip
    ways = {"BITS": packed.bits, "G_IDX": packed.g_idx is not None, "RATIO": moved, "STEPS": adapter.in_steps,
            "FRACTIONS": adapter.fractions is not None, "BASE": adapter.base is not None}  # fmt: skip
    return tensors, sizes, ways


def masked_weight(adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """``reference.masked_weight``; in float64 that."""
    if dtype == torch.float64:
        return reference.masked_weight(adapter, dtype)
    outputs, inputs = adapter.b_OR.shape[0], adapter.a_RI.shape[1]
    out_OI = torch.empty(outputs, inputs, dtype=dtype, device=adapter.b_OR.device)
    base = adapter.mask_OP if adapter.base is None else adapter.base
    float_kernel[blocks(outputs, inputs)](
        base, adapter.mask_OP, adapter.a_RI, adapter.b_OR, out_OI, float(adapter.scale), outputs, inputs,
        adapter.mask_OP.shape[1], len(adapter.a_RI), *base.stride(), *factors(adapter), BASE=adapter.base is not None,
        **TILE, **OPTIONS,
    )  # fmt: skip
    return out_OI


def dequantized(packed: Packed, inputs: int, dtype: torch.dtype) -> Tensor:
    """``reference.dequantized``."""
    outputs = packed.scales.shape[1]
    out_IO = torch.empty(inputs, outputs, dtype=dtype, device=packed.scales.device)
    group = packed.qweight if packed.g_idx is None else packed.g_idx
    integer_kernel[blocks(outputs, inputs)](
        packed.qweight.contiguous(), packed.qzeros, group, packed.scales.contiguous(), out_IO, outputs, inputs,
        inputs // len(packed.scales), packed.qzeros.shape[1], BITS=packed.bits, G_IDX=packed.g_idx is not None,
        **TILE, **OPTIONS,
    )  # fmt: skip
    return out_IO.mT


def quant_aware_weight(packed: Packed, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """``reference.quant_aware_weight``."""
    outputs, inputs = adapter.b_OR.shape[0], adapter.a_RI.shape[1]
    tensors, sizes, ways = grid_arguments(packed, adapter)
    out_OI = reference.empty_IO(adapter, dtype).mT
    grid_kernel[blocks(outputs, inputs)](
        *tensors, out_OI, float(adapter.scale), outputs, inputs, *sizes, *out_OI.stride(), **ways, **TILE, **OPTIONS
    )
    return out_OI
