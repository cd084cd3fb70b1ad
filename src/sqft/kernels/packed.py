"""Packed storage: integers of 2, 3, 4 or 8 bits in 32-bit words, weights made of them, and masks of one bit a weight.

Words have the layout of GPTQ checkpoints, a bit stream along dimension 0: value k of a column takes bits ``k * bits``
and up of that column's stream, the lowest bit first; the stream is cut into int32 words. At 3 bits a value may lie
across two words. Shape letters: N values, M columns, W words; O output features, I input features, G groups,
P = ceil(I / 8) mask bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def word_count(values: int, bits: int) -> int:
    """Words a column of so many values takes."""
    return -(-values * bits // 32)


def _places(bits: int) -> tuple[int, int, list[tuple[int, int]]]:
    """(values, words) after which the layout repeats, and each value's (word, first bit)."""
    values = 32 // math.gcd(32, bits)
    return values, values * bits // 32, [divmod(k * bits, 32) for k in range(values)]


def pack_words(q_NM: Tensor, bits: int) -> Tensor:
    """Integers [N, M] in [0, 2^bits - 1] to int32 [W, M]; unused bits are 0."""
    count, columns = q_NM.shape
    values, words, places = _places(bits)
    periods = -(-count // values)
    padded = torch.zeros(periods * values, columns, dtype=torch.int64, device=q_NM.device)
    padded[:count] = q_NM
    padded = padded.view(periods, values, columns)
    stream = torch.zeros(periods, words, columns, dtype=torch.int64, device=q_NM.device)
    for k, (word, shift) in enumerate(places):
        stream[:, word] |= padded[:, k] << shift
        if shift + bits > 32:
            stream[:, word + 1] |= padded[:, k] >> (32 - shift)
    stream &= 0xFFFFFFFF
    stream -= (stream >> 31) << 32  # to signed words
    return stream.view(-1, columns)[: word_count(count, bits)].to(torch.int32)


def unpack_words(words_WM: Tensor, count: int, bits: int) -> Tensor:
    """Inverse of ``pack_words``: int32 [count, M]."""
    values, words, places = _places(bits)
    columns, mask = words_WM.shape[1], 2**bits - 1
    if words_WM.stride(1) != 1:  # as compressed-tensors' lie
        words_WM = words_WM.contiguous()
    periods = -(-count // values)
    if words_WM.shape[0] < periods * words:  # a last period that is cut off
        words_WM = torch.cat([words_WM, words_WM.new_zeros(periods * words - words_WM.shape[0], columns)])
    stream = words_WM.view(periods, words, columns)
    out = torch.empty(periods, values, columns, dtype=torch.int32, device=words_WM.device)
    for k, (word, shift) in enumerate(places):
        target = out[:, k]
        torch.bitwise_right_shift(stream[:, word], shift, out=target)
        if shift + bits > 32:
            target &= 2 ** (32 - shift) - 1  # the sign bit was shifted in
            target |= stream[:, word + 1] << (32 - shift)
        target &= mask
    return out.view(-1, columns)[:count]


class Packed(NamedTuple):
    """A weight [O, I] on its grid, in the GPTQ layout ("v2": zero points as they are).

    ``qweight`` int32 [I * bits / 32, O], ``qzeros`` int32 [G, O * bits / 32], ``scales`` [G, O], ``g_idx`` int32 [I],
    the group of each column, or None where groups are contiguous.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    bits: int

    @property
    def largest(self) -> int:
        return 2**self.bits - 1

    def zeros_GO(self) -> Tensor:
        """int32 [G, O]."""
        return unpack_words(self.qzeros.mT, self.scales.shape[1], self.bits).mT.contiguous()

    def by_column(self, value_GO: Tensor) -> Tensor:
        """Per-group values as [G, 1, O], or [I, 1, O] with ``g_idx``: they fit a weight viewed as [that, -1, O]."""
        return (value_GO if self.g_idx is None else value_GO.index_select(0, self.g_idx))[:, None]


def pack_mask(mask_OI: Tensor) -> Tensor:
    """Packs bool [O, I], on any device, to uint8 [O, P], the first column in the lowest bit. Bits beyond I are 0."""
    rows, columns = mask_OI.shape
    padded = F.pad(mask_OI.to(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)
    weights = (1 << torch.arange(8, device=mask_OI.device)).to(torch.uint8)
    return (padded * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(mask_OP: Tensor, columns: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Inverse of ``pack_mask``: [O, columns] of 0 and 1 in ``dtype``. One table row (8 values) a byte."""
    shifts = torch.arange(8, device=mask_OP.device)
    table = ((torch.arange(256, device=mask_OP.device)[:, None] >> shifts) & 1).to(dtype)
    return table.index_select(0, mask_OP.flatten().int()).view(mask_OP.shape[0], -1)[:, :columns]


def unpack_mask_IO(mask_OP: Tensor, inputs: int) -> Tensor:
    """``unpack_mask`` transposed, float32 [I, O], contiguous."""
    bits_PO = mask_OP.mT.contiguous()
    out = torch.empty(bits_PO.shape[0], 8, bits_PO.shape[1], dtype=torch.uint8, device=mask_OP.device)
    for k in range(8):
        torch.bitwise_right_shift(bits_PO, k, out=out[:, k])
    return out.bitwise_and_(1).view(-1, bits_PO.shape[1])[:inputs].float()
