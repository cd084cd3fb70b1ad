"""The quantization grid: the one definition of scales, integer zero points, rounding and de-quantization.

A weight w of group g is stored as the integer ``q = clamp(round(w / scale_g) + zero_g, 0, 2^bits - 1)`` and means
``(q - zero_g) * scale_g``. Zero points are integers in [0, 2^bits - 1], so 0.0 is always exactly on the grid.

Shape letters: O output features, I input features, G groups along the input, S = I / G columns a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sqft.errors import UsageError
from sqft.kernels.dispatch import row_chunks

GROUP_SIZES = (32, 64, 128, -1)
SMALLEST_SCALE = 2.0**-24  # of float16
SHRINKS = tuple(1 - i / 64 for i in range(33))  # of the range, when searching the one of least error: down to a half


@dataclass(frozen=True)
class GridSpec:
    """What a grid is asked to be.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale and a zero point; -1: the whole row.
        symmetric: the zero point is 2^(bits - 1) and the range is symmetric; otherwise it follows minimum and maximum.
        clip: 'none' (the range covers every weight), or the range of least error, which may clip the largest: 'mse' (of
            squared errors) or 'hessian' (of the group's share of the layer's outputs).
        scale_bits: round scales to so many significant bits; 7 makes 4-bit grids exact in GGUF's Q4_1.
        min_zero: the smallest zero point. Kernels that store zero - 1 want 1.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    clip: str = "none"
    scale_bits: int | None = None
    min_zero: int = 0

    @property
    def largest(self) -> int:
        """The largest integer, 2^bits - 1."""
        return 2**self.bits - 1

    def columns(self, inputs: int) -> int:
        """Columns a group of a weight with so many inputs. Raises UsageError if the group size does not divide them."""
        size = inputs if self.group_size == -1 else self.group_size
        if inputs % size:
            fit = ", ".join(str(s) for s in GROUP_SIZES if s == -1 or inputs % s == 0)
            raise UsageError(f"group size {size} does not divide {inputs} inputs: choose from {fit}")
        return size


@dataclass(frozen=True)
class Grid:
    """Scales float16 [O, G] and zero points uint8 [O, G] of one weight.

    ``group_I``: int64 [I], the group of each column, where groups are not contiguous (act-order without static groups,
    as other tools write it); None where column i is of group i // S.
    """

    bits: int
    scale_OG: Tensor
    zero_OG: Tensor
    group_I: Tensor | None = None

    @property
    def largest(self) -> int:
        return 2**self.bits - 1

    def spread(self, value_OG: Tensor, columns: int) -> Tensor:
        """float32 [O, I]: the value of each column's group."""
        value = value_OG.float()
        if self.group_I is not None:
            return value.index_select(1, self.group_I)
        return value.repeat_interleave(columns // value.shape[1], 1)

    def integers(self, w_OI: Tensor) -> Tensor:
        """uint8 [O, I] in [0, 2^bits - 1]: the nearest points of the grid."""
        scale, zero = (self.spread(v, w_OI.shape[1]) for v in (self.scale_OG, self.zero_OG))
        return (w_OI.float() / scale).round().add(zero).clamp(0, self.largest).to(torch.uint8)

    def dequantize(self, q_OI: Tensor) -> Tensor:
        """float32 [O, I]: what the integers mean, exactly (a float16 scale times at most 8 bits)."""
        scale, zero = (self.spread(v, q_OI.shape[1]) for v in (self.scale_OG, self.zero_OG))
        return (q_OI.float() - zero) * scale


def fit(w_OI: Tensor, spec: GridSpec, h_II: Tensor | None = None) -> Grid:
    """The grid of a weight: by minimum and maximum of each group, or by least error.

    Scales are rounded to float16 (and to ``scale_bits``) here, so that every integer is computed with the scale that is
    stored. ``h_II``, X^T X of the inputs, weighs the errors e of a group's weights: with ``clip='mse'`` by its diagonal
    (without it all columns count alike), with 'hessian' by the group's block, e^T H_gg e. Raises UsageError if the
    group size does not divide I, or 'hessian' is without one.
    """
    rows, inputs = w_OI.shape
    size = spec.columns(inputs)
    w_OGS = w_OI.detach().float().reshape(rows, -1, size)
    low, high = w_OGS.amin(-1).clamp(max=0), w_OGS.amax(-1).clamp(min=0)
    if spec.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale_OG, zero_OG = _from_range(low, high, spec)
    if spec.clip != "none":
        weigh = _weighing(h_II, spec.clip, inputs, size)
        for chunk in row_chunks(rows, 4 * inputs, w_OI.device):
            scale_OG[chunk], zero_OG[chunk] = _least_error(w_OGS[chunk], low[chunk], high[chunk], weigh, spec)
    return Grid(spec.bits, scale_OG.half(), zero_OG.to(torch.uint8))


def _weighing(h_II: Tensor | None, clip: str, inputs: int, size: int) -> Callable[[Tensor], Tensor]:
    """What makes [O, G] of errors [O, G, S], which it may write to."""
    if clip == "hessian":
        if h_II is None:
            raise UsageError("clip hessian needs a method that knows the Hessian of the inputs, such as gptq")
        groups = torch.arange(inputs, device=h_II.device).view(-1, size)
        h_GSS = h_II[groups[:, :, None], groups[:, None, :]].float()
        return lambda e_OGS: (torch.bmm(e_OGS.transpose(0, 1), h_GSS).transpose(0, 1) * e_OGS).sum(-1)
    if h_II is None:
        return lambda e_OGS: e_OGS.square_().sum(-1)
    importance_GS = h_II.diagonal().float().view(-1, size)  # by the square of its input a column's error counts
    return lambda e_OGS: e_OGS.square_().mul_(importance_GS).sum(-1)


def _least_error(w_OGS: Tensor, low_OG: Tensor, high_OG: Tensor, weigh: Callable[[Tensor], Tensor],
                 spec: GridSpec) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scale and zero point of the shrunk range with the least weighted error."""
    best_scale, best_zero = _from_range(low_OG, high_OG, spec)
    least = torch.full_like(low_OG, torch.inf)
    for shrink in SHRINKS:
        scale, zero = _from_range(low_OG * shrink, high_OG * shrink, spec)
        q = torch.mul(w_OGS, (1 / scale)[..., None])
        below = -zero[..., None]
        error = weigh(q.round().clamp_(below, below + spec.largest).sub_(q))
        error.mul_(scale.square())
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _from_range(low_OG: Tensor, high_OG: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point (float32 [O, G]) of ranges that contain 0; an empty range gets the range [-1, 1]."""
    empty = high_OG == low_OG
    low, high = torch.where(empty, -1.0, low_OG), torch.where(empty, 1.0, high_OG)
    if spec.min_zero and not spec.symmetric:  # what lies above 0 has fewer integers
        low = torch.minimum(low, -high * (spec.min_zero / (spec.largest - spec.min_zero)))
    scale = (high - low) / spec.largest
    if spec.scale_bits is not None:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp((mantissa * 2**spec.scale_bits).round() / 2**spec.scale_bits, exponent)
    scale = scale.half().clamp(min=SMALLEST_SCALE).float()
    if spec.symmetric:
        return scale, torch.full_like(scale, 2 ** (spec.bits - 1))
    return scale, (-low / scale).round().clamp(spec.min_zero, spec.largest)
