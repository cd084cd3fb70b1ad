"""The adapted weight and its gradients in plain torch, as in the paper (SQFT, arXiv 2410.03750).

    SparsePEFT (eq. 1)             W' = W + s * M o (B A)
    QA-SparsePEFT (section 3.4)    W' = Q(W + s * M o (B A))    Q(w) = scale * clamp(round(w / scale), -z, largest - z)
      in units of the grid         W' = Q(W + scale * s * M o (B A))     (as LR-QAT's adapters, arXiv 2406.06385)

These functions are the truth that every kernel is compared with, and what runs where a device has no kernel. Neither
holds more than a chunk, which stays in the cache, beside its results.

Shape letters: T tokens, O output features, I input features, R rank, G groups, P = ceil(I / 8) packed mask bytes.
Packed words run along the input, so packed weights are built as [I, O] and returned as [O, I] views of it. With an
un-quantized base, which is [O, I], they are built as views of [O, I] memory: nothing large is transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sqft.kernels.dispatch import accumulation_dtype, product, row_chunks
from sqft.kernels.packed import Packed, unpack_mask, unpack_mask_IO, unpack_words

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0  # of float16
SCALE_REACH = 16.0  # a learnt scale stays within this factor of the base's


class Adapter(NamedTuple):
    """What is added to a weight: ``scale * M o (B A)``.

    ``base``: the float weight [O, I] that it is added to: SparsePEFT's, or the un-quantized one of a packed weight;
    None stands for what the packed integers mean. ``new_scales``: float32 [G, O] that are learnt instead of the packed
    weight's, or None. ``fractions``: int8 [I, O], in 256ths of a step what rounding to the packed integers took away,
    or None. ``in_steps``: the adapter counts in steps of the grid.
    """

    a_RI: Tensor
    b_OR: Tensor
    mask_OP: Tensor
    scale: float
    base: Tensor | None = None
    new_scales: Tensor | None = None
    fractions: Tensor | None = None
    in_steps: bool = False


def masked_weight(adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """``W + s * M o (B A)`` [O, I] in ``dtype``, computed in float32 at least; without W the masked adapter alone. A
    pruned weight is exactly 0: W's own pruned entries are zero, so masking the sum equals masking the adapter."""
    accumulate = accumulation_dtype(dtype)
    a_RI, b_OR = adapter.a_RI.to(accumulate), adapter.b_OR.to(accumulate)
    rows, columns = b_OR.shape[0], a_RI.shape[1]
    out_OI = torch.empty(rows, columns, dtype=dtype, device=b_OR.device)
    for chunk in row_chunks(rows, columns, b_OR.device):
        target = out_OI[chunk] if dtype == accumulate else torch.empty_like(out_OI[chunk], dtype=accumulate)
        if adapter.base is None:
            torch.mm(b_OR[chunk], a_RI, out=target).mul_(adapter.scale)
        else:
            torch.addmm(adapter.base[chunk].to(accumulate), b_OR[chunk], a_RI, alpha=adapter.scale, out=target)
        target.mul_(unpack_mask(adapter.mask_OP[chunk], columns, accumulate))
        if target.dtype != dtype:
            out_OI[chunk] = target
    return out_OI


def masked_gradients(dy_TO: Tensor, x_TI: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Gradients of A and B: with G = s * M o (dY^T X), dA = B^T G and dB = G A^T."""
    accumulate = accumulation_dtype(dy_TO.dtype)
    a, b = adapter.a_RI.to(accumulate), adapter.b_OR.to(accumulate)
    rows, columns = b.shape[0], a.shape[1]
    da_RI, db_OR = torch.zeros_like(a), torch.empty_like(b)
    for chunk in row_chunks(rows, columns, b.device):
        g = product(dy_TO[:, chunk].mT, x_TI.mT).to(accumulate)
        g.mul_(unpack_mask(adapter.mask_OP[chunk], columns, accumulate))
        torch.mm(g, a.mT, out=db_OR[chunk])
        da_RI.addmm_(b[chunk].mT, g)
    return da_RI.mul_(adapter.scale).to(adapter.a_RI.dtype), db_OR.mul_(adapter.scale).to(adapter.b_OR.dtype)


def dequantized(packed: Packed, inputs: int, dtype: torch.dtype) -> Tensor:
    """``(q - z) * scale`` [O, I] in ``dtype``, computed in float32."""
    outputs = packed.scales.shape[1]
    out_IO = torch.empty(inputs, outputs, dtype=dtype, device=packed.scales.device)
    zeros = packed.by_column(packed.zeros_GO())
    scales = packed.by_column(packed.scales.float())
    for chunk in row_chunks(outputs, inputs, out_IO.device):
        q = unpack_words(packed.qweight[:, chunk], inputs, packed.bits).view(len(zeros), -1, chunk.stop - chunk.start)
        w = q.sub_(zeros[..., chunk]).to(torch.float32).mul_(scales[..., chunk])
        out_IO[:, chunk] = w.view(inputs, -1)
    return out_IO.mT


def scale_limits(packed: Packed) -> tuple[Tensor, Tensor]:
    """The least and the largest value, float32 [G, O], of a learnt scale: the base's, divided and multiplied by
    SCALE_REACH, and a positive finite float16. Unlimited, a scale that crosses zero turns the weights to NaN (a
    remedy for what LSQ, arXiv 1902.08153, leaves to a small learning rate)."""
    base = packed.scales.float()
    return (base / SCALE_REACH).clamp_(min=SMALLEST_SCALE), (base * SCALE_REACH).clamp_(SMALLEST_SCALE, LARGEST_SCALE)


def grid_scales(packed: Packed, adapter: Adapter) -> Tensor:
    """[G, O]: the scales in force, in forward, backward and merge alike. Learnt ones lie within ``scale_limits`` and
    are rounded to float16, as they will be stored."""
    if adapter.new_scales is None:
        return packed.scales
    low, high = scale_limits(packed)
    return adapter.new_scales.float().clamp(low, high).half()


def _pieces(packed: Packed, adapter: Adapter) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The adapted weight in units of its scale, before rounding. With u the base in units of its own scale s0,
    ``(q - z) + fraction``, or ``W / s0`` of an un-quantized base W,

        t = s0 / scale * u + s / scale * M o (B A)      or, if the adapter counts in steps,      t = u + s * M o (B A).

    Gives a chunk of outputs, t [n, I / n, chunk], the mask [I, chunk], the least and the largest t and the scales, to
    match t. With B = 0 and the base's scales t rounds to q - z: the fractions are less than a half and exact."""
    a_IR, b_RO = adapter.a_RI.float().mT, adapter.b_OR.float().mT * adapter.scale
    inputs, outputs = a_IR.shape[0], b_RO.shape[1]
    scales_GO = grid_scales(packed, adapter).float()
    zeros = packed.by_column(packed.zeros_GO())
    scales = packed.by_column(scales_GO)
    # What the base and the adapter are multiplied with; None: with 1.
    own = packed.by_column(1 / (packed.scales.float() if adapter.in_steps else scales_GO))
    ratio = None
    if adapter.new_scales is not None and not adapter.in_steps:
        ratio = packed.by_column(packed.scales.float() / scales_GO)
    low = (-zeros).float()
    for chunk in row_chunks(outputs, inputs, b_RO.device):
        shape = (len(zeros), -1, chunk.stop - chunk.start)
        if adapter.base is None:
            mask = unpack_mask_IO(adapter.mask_OP[chunk], inputs)
            t = torch.mm(a_IR, b_RO[:, chunk]).mul_(mask).view(shape)
            if not adapter.in_steps:
                t.mul_(own[..., chunk])
            u = unpack_words(packed.qweight[:, chunk], inputs, packed.bits).view(shape).sub_(zeros[..., chunk])
            if adapter.fractions is not None:
                u = torch.add(u, adapter.fractions[:, chunk].float().view(shape), alpha=1 / 256)
            t += u if ratio is None else u * ratio[..., chunk]
        else:
            mask = unpack_mask(adapter.mask_OP[chunk], inputs, torch.float32).mT
            base, b_CR = adapter.base[chunk].float(), b_RO[:, chunk].mT
            if adapter.in_steps:
                base = base.mT.view(shape).mul(own[..., chunk]).view(mask.shape).mT
            t = torch.addmm(base, b_CR, a_IR.mT).mT.mul_(mask).view(shape)
            if not adapter.in_steps:
                t.mul_(own[..., chunk])
        below = low[..., chunk]
        yield chunk, t, mask, below, below + packed.largest, scales[..., chunk]


def empty_IO(adapter: Adapter, dtype: torch.dtype) -> Tensor:
    outputs, inputs = adapter.b_OR.shape[0], adapter.a_RI.shape[1]
    if adapter.base is None:
        return adapter.b_OR.new_empty(inputs, outputs, dtype=dtype)
    return adapter.b_OR.new_empty(outputs, inputs, dtype=dtype).mT


def quant_aware_weight(packed: Packed, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """``Q(W + s * M o (B A))`` [O, I] in ``dtype``, computed in float32."""
    out_IO = empty_IO(adapter, dtype)
    for chunk, t, _, low, high, scales in _pieces(packed, adapter):
        w = torch.clamp(t.round_(), low, high, out=t).mul_(scales)
        out_IO[:, chunk] = w.view(len(out_IO), -1)
    return out_IO.mT


def quant_aware_gradients(dy_TO: Tensor, x_TI: Tensor, packed: Packed,
                          adapter: Adapter) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of A, B and the learnt scales, and the weight [O, I] in x's dtype, for the gradient of x: one loop.

    Rounding is straight-through; the clamp passes gradients inside its range and none outside, where the rounded
    weight does not move with t. With G = dY^T X, and C 1 where t is inside the range: dA = s B^T (M o C o G),
    dB = s (M o C o G) A^T, and for a learnt scale the sum over its group of G o (clamp(round(t)) - C o t) (LSQ, arXiv
    1902.08153, eq. 3). For an adapter that counts in steps G o scale stands in dA and dB, and t does not depend on the
    scale: its gradient is exactly the sum of G o clamp(round(t)). A scale beyond one of ``scale_limits`` keeps a
    gradient that leads back inside, and no other.
    """
    a_RI, b_OR = adapter.a_RI.float(), adapter.b_OR.float()
    w_IO = empty_IO(adapter, x_TI.dtype)
    da_IR, db_OR = torch.zeros_like(a_RI.mT), torch.empty_like(b_OR)
    ds_GO = None if adapter.new_scales is None else torch.zeros_like(adapter.new_scales)
    for chunk, t, mask, low, high, scales in _pieces(packed, adapter):
        g_IO = product(dy_TO[:, chunk].mT, x_TI.mT).mT.float()
        if adapter.base is None:
            g_IO = g_IO.contiguous()
        nearest = t.round_() if ds_GO is None else t.round()
        rounded = torch.clamp(nearest, low, high)
        inside = nearest.eq_(rounded)  # 1.0 or 0.0, in place: several times faster than masked_fill
        if ds_GO is not None:
            moved = rounded if adapter.in_steps else rounded - t.mul_(inside)
            by_column = g_IO.view(t.shape) * moved
            if packed.g_idx is None:
                ds_GO[:, chunk] += by_column.sum(1)
            else:
                ds_GO[:, chunk].index_add_(0, packed.g_idx, by_column[:, 0])
        g_IO.mul_(mask).view(t.shape).mul_(inside)
        if adapter.in_steps:
            g_IO.view(t.shape).mul_(scales)
        da_IR.addmm_(g_IO, b_OR[chunk])
        torch.mm(g_IO.mT, a_RI.mT, out=db_OR[chunk])
        w_IO[:, chunk] = rounded.mul_(scales).view(len(w_IO), -1)
    if ds_GO is not None and adapter.new_scales is not None:
        low, high = scale_limits(packed)
        ds_GO[(adapter.new_scales < low) & (ds_GO > 0) | (adapter.new_scales > high) & (ds_GO < 0)] = 0
    return da_IR.mT.mul(adapter.scale), db_OR.mul_(adapter.scale), ds_GO, w_IO.mT
