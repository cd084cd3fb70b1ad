"""What every kernel here builds a tile of a weight by, so that forward, backward and merging have the same bits.

Sums over the rank are in float32 and in the order r = 0, 1, ... by multiply-add, whatever the shape of the tile. What
is beyond the weight's edge is 0. ``kernels/reference.py`` has the mathematics.

Shape letters: O output features, I input features, R rank, G groups, P packed mask bytes.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# A kernel's parameters are pointers and constants of Triton's, its arguments tensors and numbers.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rank_sum(a_ptr, b_ptr, o, i, O, I, R, a_r, a_i, b_o, b_r):
    """(B A)[o, i] in float32; ``a_r`` and the like are strides."""
    total = tl.zeros((o.shape[0], i.shape[0]), dtype=tl.float32)
    for r in range(0, R):
        b = tl.load(b_ptr + o * b_o + r * b_r, mask=o < O, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + r * a_r + i * a_i, mask=i < I, other=0.0).to(tl.float32)
        total = tl.fma(b[:, None], a[None, :], total)
    return total


@triton.jit
def kept(mask_ptr, o, i, O, I, P):
    """Whether the mask keeps [o, i]: int32, 1 or 0."""
    inside = (o[:, None] < O) & (i[None, :] < I)
    byte = tl.load(mask_ptr + o[:, None] * P + (i[None, :] >> 3), mask=inside, other=0).to(tl.int32)
    return (byte >> (i[None, :] & 7)) & 1


@triton.jit
def float_tile(
    w_ptr, mask_ptr, a_ptr, b_ptr, scale, o, i, O, I, P, R, w_o, w_i, a_r, a_i, b_o, b_r, BASE: tl.constexpr
):
    """SparsePEFT's ``W + s * M o (B A)`` in float32, or the masked adapter alone without BASE."""
    change = rank_sum(a_ptr, b_ptr, o, i, O, I, R, a_r, a_i, b_o, b_r)
    if BASE:
        inside = (o[:, None] < O) & (i[None, :] < I)
        w = tl.load(w_ptr + o[:, None] * w_o + i[None, :] * w_i, mask=inside, other=0.0).to(tl.float32)
        change = tl.fma(change, scale, w)
    else:
        change = change * scale
    return tl.where(kept(mask_ptr, o, i, O, I, P) != 0, change, 0.0)


@triton.jit
def field(ptr, position, inside, stride, BITS: tl.constexpr):
    """The integer of BITS bits at a position of a stream of int32 words, ``stride`` apart (``packed.pack_words``)."""
    bit = position * BITS
    word = tl.load(ptr + (bit >> 5) * stride, mask=inside, other=0).to(tl.uint32, bitcast=True)
    value = word >> (bit & 31).to(tl.uint32)
    if BITS == 3:  # may lie across two words
        over = (bit & 31) + BITS > 32
        after = tl.load(ptr + ((bit >> 5) + 1) * stride, mask=inside & over, other=0).to(tl.uint32, bitcast=True)
        value = tl.where(over, value | (after << ((32 - (bit & 31)) & 31).to(tl.uint32)), value)
    return (value & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def levels(q_ptr, z_ptr, group_ptr, o, i, O, I, G_SIZE, Z_WORDS, BITS: tl.constexpr, G_IDX: tl.constexpr):
    """q - z and z, int32 [o, i], and where the group's row of scales is, for a packed weight."""
    inside = (o[:, None] < O) & (i[None, :] < I)
    if G_IDX:
        g = tl.load(group_ptr + i, mask=i < I, other=0)[None, :]
    else:
        g = i[None, :] // G_SIZE
    z = field(z_ptr + g * Z_WORDS, o[:, None], inside, 1, BITS)
    q = field(q_ptr + o[:, None], i[None, :], inside, O, BITS)
    return q - z, z, g * O + o[:, None]


@triton.jit
def nearest(x):
    """Round half to even, exact below 2^22, beyond which everything is clamped anyway."""
    magic = 12582912.0
    return (x + magic) - magic


@triton.jit
def grid_tile(q_ptr, z_ptr, group_ptr, scale_ptr, own_ptr, ratio_ptr, f_ptr, w_ptr, mask_ptr, a_ptr, b_ptr, s, o, i, O,
              I, P, R, G_SIZE, Z_WORDS, w_o, w_i, a_r, a_i, b_o, b_r, BITS: tl.constexpr, G_IDX: tl.constexpr,
              RATIO: tl.constexpr, FRACTIONS: tl.constexpr, BASE: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    """QA-SparsePEFT's weight in units of its scale before rounding, t of ``reference._pieces``; the least t, the scale,
    and what the mask keeps. ``own`` is what a float base and the adapter are divided by, as a factor."""
    inside = (o[:, None] < O) & (i[None, :] < I)
    level, z, place = levels(q_ptr, z_ptr, group_ptr, o, i, O, I, G_SIZE, Z_WORDS, BITS, G_IDX)
    scale = tl.load(scale_ptr + place, mask=inside, other=1.0).to(tl.float32)
    own = tl.load(own_ptr + place, mask=inside, other=1.0)
    keep = kept(mask_ptr, o, i, O, I, P)
    change = rank_sum(a_ptr, b_ptr, o, i, O, I, R, a_r, a_i, b_o, b_r) * s
    if BASE:
        w = tl.load(w_ptr + o[:, None] * w_o + i[None, :] * w_i, mask=inside, other=0.0).to(tl.float32)
        if STEPS:
            t = w * own + change
        else:
            t = (w + change) * own
        t = tl.where(keep != 0, t, 0.0)
    else:
        if not STEPS:
            change = change * own
        u = level.to(tl.float32)
        if FRACTIONS:
            u += tl.load(f_ptr + i[None, :] * O + o[:, None], mask=inside, other=0).to(tl.float32) * (1.0 / 256)
        if RATIO:
            u = u * tl.load(ratio_ptr + place, mask=inside, other=1.0)
        t = u + tl.where(keep != 0, change, 0.0)
    return t, -z.to(tl.float32), scale, keep
