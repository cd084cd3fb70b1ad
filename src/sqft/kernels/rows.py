"""Weights whose rows are 8-bit integers times a scale of the row: embeddings and head, where so asked.

    w = s q,   q = round(w / s) in -127 .. 127,   s = max |w| / 127, rounded up to 4 significant bits

so that s q has 11 bits and is exact in float16 (of bfloat16 s is a power of two, and s q has 8): every folder, format
and runtime holds such a weight exactly, and those that know it store a byte a weight.

Shape letters: V rows, I columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST = 127
UNIT = 2.0**-24  # float16's smallest step: every float16 is a whole number of it


class Rows(NamedTuple):
    """int8 [V, I], and a scale [V] in the weight's dtype."""

    q_VI: Tensor
    scale_V: Tensor

    def dense(self) -> Tensor:
        """[V, I] in the scale's dtype, without rounding."""
        return (self.q_VI.float() * self.scale_V.float()[:, None]).to(self.scale_V.dtype)


def round_rows(w_VI: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest such weight that ``dtype`` (float16 or bfloat16) holds exactly, in w's dtype."""
    largest_V = w_VI.double().abs().amax(1)
    bits = 4 if dtype == torch.float16 else 1
    power_V = torch.exp2(torch.floor(torch.log2((largest_V / MOST).clamp(min=UNIT))) - (bits - 1)).clamp(min=UNIT)
    scale_V = (torch.ceil(largest_V / MOST / power_V) * power_V).clamp(min=UNIT)
    scale_V1 = scale_V.float()[:, None]
    return ((w_VI.float() / scale_V1).round().to(torch.int8).float() * scale_V1).to(w_VI.dtype)


def as_rows(w_VI: Tensor) -> Rows | None:
    """The integers and scales of a half-precision weight that is such a one, bit for bit; None: it is not. The scale is
    the greatest number that all of a row are multiples of."""
    if w_VI.ndim != 2 or w_VI.dtype not in (torch.float16, torch.bfloat16) or _rows(w_VI[:1]) is None:
        return None
    return _rows(w_VI)


def _rows(w_VI: Tensor) -> Rows | None:
    units = w_VI.double() / UNIT
    common = whole = units.abs().long()
    if not torch.equal(whole.double(), units.abs()):
        return None
    while common.shape[1] > 1:  # halves of a row against each other
        half = (common.shape[1] + 1) // 2
        rest = torch.zeros_like(common[:, :half])
        rest[:, : common.shape[1] - half] = common[:, half:]
        common = torch.gcd(common[:, :half], rest)
    common_V1 = common.clamp(min=1)
    found = Rows((units / common_V1).clamp(-MOST, MOST).to(torch.int8), (common_V1[:, 0] * UNIT).to(w_VI.dtype))
    same = torch.equal(found.dense().view(torch.int16), w_VI.contiguous().view(torch.int16))
    return found if same else None
