"""The SparsePEFT product in plain torch: ``y = x (W + s * M o (B A))^T + bias`` (SQFT, arXiv 2410.03750, eq. 1).

Shape letters: T tokens, O output features, I input features, R rank, P = ceil(I / 8) packed mask bytes.

The masked adapter costs one large product in forward and two in backward (dX, and dY^T X which has to be masked
before it can be contracted with A and B). Everything else is made to be small beside those:

* Between forward and backward only x, W, A, B and the packed mask (one bit a weight) are kept. The effective weight
  is built again in backward: that is R / T of the cost of a product.
* It is built, and the weight gradient is masked, in row chunks that stay in the cache.
* Dropout keeps an 8-byte seed, not a mask of T x I; the mask is drawn again from the seed in backward.

Both directions are custom operators, so that ``torch.compile`` calls them as they are: were they traced, the compiler
would see the same weight in forward and backward and keep it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sqft.kernels.dispatch import product

# Weight elements a chunk: on a CPU 2 MiB of float32, which stay in the cache; elsewhere few launches matter more.
CHUNK_ELEMENTS = {"cpu": 1 << 19}
LARGE_CHUNK = 1 << 26


def pack_mask(mask_OI: Tensor) -> Tensor:
    """Packs bool [O, I] to uint8 [O, ceil(I / 8)], the first column in the lowest bit. Bits beyond I are 0."""
    rows, columns = mask_OI.shape
    padded = F.pad(mask_OI.to(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)
    weights = (1 << torch.arange(8, device=mask_OI.device)).to(torch.uint8)
    return (padded * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(mask_OP: Tensor, columns: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Inverse of ``pack_mask``: [O, columns] of 0 and 1 in ``dtype``. One table row (8 values) a byte."""
    table = ((torch.arange(256, device=mask_OP.device)[:, None] >> torch.arange(8, device=mask_OP.device)) & 1).to(
        dtype
    )
    return table.index_select(0, mask_OP.flatten().int()).view(mask_OP.shape[0], -1)[:, :columns]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Adapters and masked products of half-precision weights are computed in float32."""
    return torch.promote_types(dtype, torch.float32)


def row_chunks(rows: int, columns: int, device: torch.device) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS.get(device.type, LARGE_CHUNK) // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@torch.no_grad()
def masked_weight(w_OI: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float, mask_OP: Tensor,
                  dtype: torch.dtype) -> Tensor:  # fmt: skip
    """``W + scale * M o (B A)`` in ``dtype``; without W the masked adapter alone. A pruned weight is exactly 0.

    This one function builds the weight that training multiplies with and the weight that merging writes: they are
    equal bit for bit. W's own pruned entries are zero, so masking the sum equals masking the adapter.
    """
    accumulate = accumulation_dtype(dtype)
    a_RI, b_OR = a_RI.to(accumulate), b_OR.to(accumulate)
    rows, columns = b_OR.shape[0], a_RI.shape[1]
    out_OI = torch.empty(rows, columns, dtype=dtype, device=b_OR.device)
    for chunk in row_chunks(rows, columns, b_OR.device):
        target = out_OI[chunk] if dtype == accumulate else torch.empty_like(out_OI[chunk], dtype=accumulate)
        if w_OI is None:
            torch.mm(b_OR[chunk], a_RI, out=target).mul_(scale)
        else:
            torch.addmm(w_OI[chunk].to(accumulate), b_OR[chunk], a_RI, alpha=scale, out=target)
        target.mul_(unpack_mask(mask_OP[chunk], columns, accumulate))
        if target.dtype != dtype:
            out_OI[chunk] = target
    return out_OI


def masked_gradients(dy_TO: Tensor, x_TI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float,
                     mask_OP: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of A and B: with G = scale * M o (dY^T X), dA = B^T G and dB = G A^T. Never holds G whole."""
    accumulate = accumulation_dtype(dy_TO.dtype)
    a, b = a_RI.to(accumulate), b_OR.to(accumulate)
    rows, columns = b.shape[0], a.shape[1]
    da_RI, db_OR = torch.zeros_like(a), torch.empty_like(b)
    for chunk in row_chunks(rows, columns, b_OR.device):
        g = product(dy_TO[:, chunk].mT, x_TI.mT).to(accumulate)
        g.mul_(unpack_mask(mask_OP[chunk], columns, accumulate))
        torch.mm(g, a.mT, out=db_OR[chunk])
        da_RI.addmm_(b[chunk].mT, g)
    return da_RI.mul_(scale).to(a_RI.dtype), db_OR.mul_(scale).to(b_OR.dtype)


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Inverted dropout whose mask is a function of ``seed`` (int64 scalar on the CPU) alone.

    16 random bits an element, so p is met to 1 / 65536; four elements share a 64-bit draw, which makes this several
    times cheaper than ``F.dropout`` on a CPU.
    """
    generator = torch.Generator(device=x.device).manual_seed(int(seed))
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None, generator=generator)
    threshold = round(p * 65536)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - 32768
    return x.mul(keep).mul_(65536 / (65536 - threshold))


@torch.library.custom_op("sqft::sparse_linear", mutates_args=())
def sparse_linear_op(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, mask: Tensor,
                     scale: float, p: float, seed: Tensor, training: bool) -> Tensor:  # fmt: skip
    x_TI = x.reshape(-1, x.shape[-1])
    # Evaluation multiplies as nn.Linear does: un-merged and merged logits are then equal, not merely close.
    multiply = product if training else F.linear
    if p == 0:
        effective = masked_weight(weight, a, b, scale, mask, weight.dtype).to(x.dtype)
        y_TO = multiply(x_TI, effective, bias)
    else:
        delta = masked_weight(None, a, b, scale, mask, x.dtype)
        y_TO = multiply(x_TI, weight.to(x.dtype), bias)
        y_TO += multiply(drop(x_TI, p, seed), delta)
    return y_TO.view(*x.shape[:-1], weight.shape[0])


@sparse_linear_op.register_fake
def _(x, weight, bias, a, b, mask, scale, p, seed, training):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("sqft::sparse_linear_backward", mutates_args=())
def sparse_linear_backward_op(dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float,
                              p: float, seed: Tensor, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x_TI, dy_TO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx_TI = x.new_empty(0)
    if need_x and p == 0:
        dx_TI = product(dy_TO, masked_weight(weight, a, b, scale, mask, weight.dtype).to(x.dtype).mT)
    elif need_x:
        dx_TI = drop(product(dy_TO, masked_weight(None, a, b, scale, mask, x.dtype).mT), p, seed)
        dx_TI += product(dy_TO, weight.to(x.dtype).mT)
    da, db = masked_gradients(dy_TO, x_TI if p == 0 else drop(x_TI, p, seed), a, b, scale, mask)
    return dx_TI.view(x.shape) if need_x else dx_TI, da, db


@sparse_linear_backward_op.register_fake
def _(dy, x, weight, a, b, mask, scale, p, seed, need_x):
    return (torch.empty_like(x) if need_x else x.new_empty(0)), torch.empty_like(a), torch.empty_like(b)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, a, b, mask, scale, p, seed, _ = inputs
    ctx.save_for_backward(x, weight, a, b, mask, seed)
    ctx.scale, ctx.p = scale, p


def _backward(ctx, dy):
    x, weight, a, b, mask, seed = ctx.saved_tensors
    need_x, _, need_bias, *_ = ctx.needs_input_grad
    dx, da, db = torch.ops.sqft.sparse_linear_backward(
        dy.contiguous(), x, weight, a, b, mask, ctx.scale, ctx.p, seed, need_x
    )
    dbias = dy.flatten(0, -2).sum(0) if need_bias else None
    return (dx if need_x else None), None, dbias, da, db, None, None, None, None, None


sparse_linear_op.register_autograd(_backward, setup_context=_setup_context)


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, mask: Tensor, scale: float,
                  dropout: float = 0.0, training: bool = True) -> Tensor:  # fmt: skip
    """SparsePEFT's linear layer, ``y = x (W + scale * M o (B A))^T + bias``, differentiable in x, A, B and bias.

    Args:
        x: [..., I], float of any precision. Under autocast it is cast to autocast's dtype, as ``F.linear`` would.
        weight: [O, I], frozen, zero where the mask is 0. The sum is computed in float32 at least and rounded to
            weight's dtype, so that what is trained is, bit for bit, what merging writes.
        bias: [O] or None.
        a, b: [R, I] and [O, R], usually float32.
        mask: uint8 [O, ceil(I / 8)] of ``pack_mask``.
        scale: alpha / r.
        dropout: probability of dropping an input element **of the adapter**; the base path is never dropped. A
            positive value needs a second product, ``y = x W^T + scale * drop(x) (M o (B A))^T``.
        training: use the fastest product; otherwise multiply as ``nn.Linear`` does, and drop nothing.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            bias = bias if bias is None else bias.to(dtype)
            return sparse_linear(x.to(dtype), weight, bias, a, b, mask, scale, dropout, training)
    dropout = float(dropout) if training else 0.0
    # The seed comes from the CPU generator: no synchronisation with a GPU, and checkpointing restores it.
    seed = torch.randint(2**62, (), dtype=torch.int64) if dropout else torch.zeros((), dtype=torch.int64)
    return torch.ops.sqft.sparse_linear(x, weight, bias, a, b, mask, float(scale), dropout, seed, training)
