"""Columns of a weight that change one after the other, each one's error made good by those after it: the inner loop of
GPTQ and SparseGPT (``calibration/surgeon.py``). Shape letters: O output features, S columns of a step, C of them that
change."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FRACTION = 256  # parts of a step of the grid


class Rounded(NamedTuple):
    """Of each column: its integers uint8 and what rounding took away, int8 (``fractions``); and errors e / U_jj."""

    q_CO: Tensor
    fractions_CO: Tensor
    errors_CO: Tensor


def fractions(difference: Tensor) -> Tensor:
    """int8: differences of weights in steps of the grid, before less after rounding, in 256ths of a step and less than
    half a step, so that integer plus fraction is exact in float32 and rounds to the integer, never to its neighbour."""
    return difference.mul(FRACTION).round_().clamp_(1 - FRACTION // 2, FRACTION // 2 - 1).to(torch.int8)


def one_by_one(w_SO: Tensor, u_SS: Tensor, columns: range, choose: Callable[[int], Tensor]) -> Tensor:
    """Changes ``columns`` of a step in place: ``choose(j)`` [O] is what column j ends as. Its error
    ``e = (w_j - choose(j)) / U_jj`` changes all that come after it in the step by ``- e U_j,later`` before they are
    chosen. Returns the errors, [C, O]."""
    errors_CO, diagonal = w_SO.new_empty(len(columns), w_SO.shape[1]), u_SS.diagonal().tolist()
    for place, j in enumerate(columns):
        chosen = choose(j)
        error = torch.sub(w_SO[j], chosen, out=errors_CO[place]).div_(diagonal[j])
        w_SO[j] = chosen
        w_SO[j + 1 :].addr_(u_SS[j, j + 1 :], error, alpha=-1)
    return errors_CO


def round_columns(w_SO: Tensor, u_SS: Tensor, columns: range, scale_CO: Tensor, zero_CO: Tensor,
                  mask_CO: Tensor | None, largest: int, propagate: bool = True) -> Rounded:  # fmt: skip
    """Rounds ``columns`` of a step in place, ``one_by_one``.

    Args:
        w_SO: float32 or float64, a step's columns as rows.
        u_SS: upper triangular, of w's dtype.
        scale_CO, zero_CO: the grid of each of ``columns``, of w's dtype.
        mask_CO: bool, False where pruned: this ends at 0. None: nothing is.
        largest: the largest integer.
        propagate: pass on the corrections that a pruned weight has received.
    """
    q_CO, fractions_CO = (torch.empty_like(scale_CO, dtype=dtype) for dtype in (torch.uint8, torch.int8))

    def choose(j: int) -> Tensor:
        place = j - columns.start
        scale, zero = scale_CO[place], zero_CO[place]
        units = w_SO[j] / scale
        q = units.round().add_(zero).clamp_(0, largest)
        fraction = fractions(units.add_(zero).sub_(q))
        if mask_CO is not None:
            kept = mask_CO[place]
            q = torch.where(kept, q, zero)
            fraction.mul_(kept)
            if not propagate:
                w_SO[j].mul_(kept)
        q_CO[place], fractions_CO[place] = q, fraction
        return q.sub_(zero).mul_(scale)

    return Rounded(q_CO, fractions_CO, one_by_one(w_SO, u_SS, columns, choose))
