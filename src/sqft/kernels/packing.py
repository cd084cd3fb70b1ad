"""Integers of 2, 3, 4 or 8 bits in 32-bit words, in the layout of GPTQ checkpoints: a bit stream along dimension 0.

Value k of a column takes bits ``k * bits`` and up of that column's stream, the lowest bit first; the stream is cut into
int32 words. At 3 bits a value may lie across two words. Shape letters: N values, M columns, W words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def word_count(values: int, bits: int) -> int:
    """Words a column of so many values takes."""
    return -(-values * bits // 32)


def _places(bits: int) -> tuple[int, int, list[tuple[int, int]]]:
    """(values, words) after which the layout repeats, and each value's (word, first bit)."""
    values = 32 // math.gcd(32, bits)
    return values, values * bits // 32, [divmod(k * bits, 32) for k in range(values)]


def pack(q_NM: Tensor, bits: int) -> Tensor:
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


def unpack(words_WM: Tensor, count: int, bits: int) -> Tensor:
    """Inverse of ``pack``: int32 [count, M]."""
    values, words, places = _places(bits)
    columns, mask = words_WM.shape[1], 2**bits - 1
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
