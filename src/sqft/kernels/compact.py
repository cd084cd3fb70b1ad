"""The compact form of a sparse weight: one bit a weight says which are stored, and those lie one after the other.

Columns are taken in groups of 64, so that a group's bits are one word. Of floats the stored values follow each other
in the order of rows and columns. Integers of ``bits`` bits are a bit stream, the lowest bit first, that begins at a new
byte with every group: where all groups store equally many (32 of 64, say), each lies at a fixed place. What is not
stored is +0.0, or of integers the group's zero point.

Bits a weight: 1 + share x bits; 50 % of 4 bits take 3, of float16 9.

Shape letters: O output features, I input features, B = ceil(I / 64) groups, P = ceil(I / 8) mask bytes, N stored
values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sqft.kernels.dispatch import row_chunks
from sqft.kernels.packed import unpack_mask

WIDTH = 64  # columns a group: the bits of a word


class Compact(NamedTuple):
    """A weight [O, I]. ``mask_OB``: int64, bit i of word b is column 64 b + i, and bits beyond I are 0. ``values``: of
    floats [N]; of integers of ``bits`` bits, uint8, as many bytes as all groups take; ``bits`` 0: floats."""

    mask_OB: Tensor
    values: Tensor
    inputs: int
    bits: int = 0


class CompactWeight(NamedTuple):
    """A compact weight as products take it. ``starts`` int64 [O + 1]; of integers float32 ``scale_OG`` and uint8
    ``zero_OG``, of which ``group`` columns each share one; of floats both are empty."""

    compact: Compact
    starts: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    group: int = 0


def packed_mask(compact: Compact) -> Tensor:
    """uint8 [O, P], as ``packed.pack_mask`` gives it: the words' bytes."""
    return compact.mask_OB.view(torch.uint8)[:, : -(-compact.inputs // 8)]


def mask_words(packed_OP: Tensor) -> Tensor:
    """Inverse of ``packed_mask``."""
    return F.pad(packed_OP, (0, -packed_OP.shape[1] % 8)).view(torch.int64)


def counts(mask_OB: Tensor) -> Tensor:
    """int64 [O, B]: values that each group stores."""
    pairs = mask_OB - ((mask_OB >> 1) & 0x5555555555555555)  # bits of each 2, then 4, then 8
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (eights * 0x0101010101010101) >> 56


def starts(compact: Compact) -> Tensor:
    """int64 [O + 1]: where each row begins in ``values``, and their end."""
    sizes_OB = _sizes(counts(compact.mask_OB), compact.bits)
    return torch.cat([sizes_OB.new_zeros(1), sizes_OB.sum(1).cumsum(0)])


def stride(compact: Compact) -> int | None:
    """Elements of ``values`` that every group takes, if all take equally many."""
    low, high = (int(count) for count in _sizes(counts(compact.mask_OB), compact.bits).aminmax())
    return low if low == high else None


def pack(w_OI: Tensor, packed_mask_OP: Tensor, bits: int = 0) -> Compact:
    """The compact form of floats, or of integers uint8 of ``bits`` bits, of which those in the mask are stored."""
    mask_OB = mask_words(packed_mask_OP)
    if not bits and bool((mask_OB == -1).all()):  # a dense weight that fills its groups
        return Compact(mask_OB, w_OI.reshape(-1), w_OI.shape[1])
    pieces = []
    for chunk in row_chunks(w_OI.shape[0], w_OI.shape[1], w_OI.device):
        stored = w_OI[chunk].masked_select(_bits(mask_OB[chunk])[:, : w_OI.shape[1]])
        pieces.append(_pack_integers(stored, mask_OB[chunk], bits) if bits else stored)
    return Compact(mask_OB, torch.cat(pieces), w_OI.shape[1], bits)


def unpack(compact: Compact, fill: Tensor | None = None) -> Tensor:
    """The weight [O, I], or its integers as uint8. ``fill`` is what is not stored, in a shape that fits [O, B, 64]; by
    default 0."""
    mask_OB, values, inputs, bits = compact
    rows, groups = mask_OB.shape
    dtype = torch.uint8 if bits else values.dtype
    w_OI = torch.zeros(rows, groups * WIDTH, dtype=dtype, device=mask_OB.device)
    if fill is not None:
        w_OI.view(rows, groups, WIDTH).copy_(fill)
    begin = starts(compact).tolist()
    for chunk in row_chunks(rows, groups * WIDTH, mask_OB.device):
        mine = values[begin[chunk.start] : begin[chunk.stop]]
        found = _unpack_integers(mine, mask_OB[chunk], bits) if bits else mine
        w_OI[chunk].masked_scatter_(_bits(mask_OB[chunk]), found)
    return w_OI[:, :inputs]


def dense(weight: CompactWeight, dtype: torch.dtype) -> Tensor:
    """[O, I] in ``dtype``."""
    mask_OB, _, inputs, bits = weight.compact
    if not bits:
        return unpack(weight.compact).to(dtype)
    scale, zero = (values.float().repeat_interleave(weight.group, 1) for values in (weight.scale_OG, weight.zero_OG))
    fill = F.pad(zero.to(torch.uint8), (0, -inputs % WIDTH)).view(*mask_OB.shape, WIDTH)
    return (unpack(weight.compact, fill) - zero).mul_(scale).to(dtype)


def linear(x_TI: Tensor, weight: CompactWeight) -> Tensor:
    """``x w^T`` -> [T, O] in x's dtype: the truth for the kernels."""
    return F.linear(x_TI, dense(weight, x_TI.dtype))


def _sizes(counts_OB: Tensor, bits: int) -> Tensor:
    """Elements of ``values`` that so many stored values take."""
    return (counts_OB * bits + 7) // 8 if bits else counts_OB


def _bits(mask_OB: Tensor) -> Tensor:
    """bool [O, 64 B]."""
    return unpack_mask(mask_OB.view(torch.uint8), WIDTH * mask_OB.shape[1])


def _pack_integers(q_N: Tensor, mask_OB: Tensor, bits: int) -> Tensor:
    counts_N = counts(mask_OB).flatten()
    if 8 % bits:
        return _pack_stream(q_N, counts_N, bits)
    places, size = _padded_places(counts_N, 8 // bits)
    padded = q_N.new_zeros(size).index_copy_(0, places, q_N).view(-1, 8 // bits)
    return (padded << _shifts(q_N, bits)).sum(1, dtype=torch.uint8)


def _unpack_integers(values: Tensor, mask_OB: Tensor, bits: int) -> Tensor:
    counts_N = counts(mask_OB).flatten()
    if 8 % bits:
        return _unpack_stream(values, counts_N, bits)
    places, _ = _padded_places(counts_N, 8 // bits)
    return ((values[:, None] >> _shifts(values, bits)) & (2**bits - 1)).flatten().index_select(0, places)


def _shifts(like: Tensor, bits: int) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)


def _padded_places(counts_N: Tensor, multiple: int) -> tuple[Tensor, int]:
    """Where values go if every group is filled up to a multiple; and how many there are then."""
    total, pads = int(counts_N.sum()), -counts_N % multiple
    places = torch.arange(total, device=counts_N.device)
    return places + (pads.cumsum(0) - pads).repeat_interleave(counts_N), total + int(pads.sum())


def _stream_places(counts_N: Tensor, bits: int) -> tuple[Tensor, Tensor, int]:
    """Of every stored value its byte, and its first bit in it; and how many bytes all take."""
    sizes = _sizes(counts_N, bits)
    begin, before = sizes.cumsum(0) - sizes, counts_N.cumsum(0) - counts_N
    rank = torch.arange(int(counts_N.sum()), device=counts_N.device) - before.repeat_interleave(counts_N)
    bit = rank * bits
    return begin.repeat_interleave(counts_N) + bit // 8, bit % 8, int(sizes.sum())


def _pack_stream(q_N: Tensor, counts_N: Tensor, bits: int) -> Tensor:
    """Where a value may lie across two bytes."""
    byte, shift, size = _stream_places(counts_N, bits)
    shifted = q_N.int() << shift
    stream = torch.zeros(size + 1, dtype=torch.int32, device=q_N.device)
    stream.index_add_(0, byte, (shifted & 255).int()).index_add_(0, byte + 1, (shifted >> 8).int())
    return stream[:-1].to(torch.uint8)


def _unpack_stream(values: Tensor, counts_N: Tensor, bits: int) -> Tensor:
    byte, shift, _ = _stream_places(counts_N, bits)
    found = values[byte].int() | torch.cat([values, values.new_zeros(1)])[byte + 1].int() << 8
    return ((found >> shift) & (2**bits - 1)).to(torch.uint8)
