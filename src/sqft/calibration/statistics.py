"""Streaming statistics of a linear layer's inputs. Shape letters: T tokens, I input features."""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.kernels.dispatch import product

STRIP = 256  # rows of a Hessian that are computed at once


class ColumnNorm:
    """L2 norm of every input feature over all tokens seen, summed in float64."""

    def __init__(self) -> None:
        self._sum_I: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Adds tokens; x: [..., I]."""
        x_TI = x.reshape(-1, x.shape[-1]).float()
        squares_I = x_TI.square().sum(0, dtype=torch.float64)
        self._sum_I = squares_I if self._sum_I is None else self._sum_I + squares_I

    def norm(self) -> Tensor:
        """float64 [I]."""
        assert self._sum_I is not None, "no tokens seen"
        return self._sum_I.sqrt()


class Hessian:
    """``X^T X`` over all tokens seen: GPTQ's Hessian up to a factor, summed in float32.

    It is symmetric: of each strip of rows only the part up to the diagonal is computed.
    """

    def __init__(self) -> None:
        self._sum_II: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Adds tokens; x: [..., I]."""
        x_IT = x.reshape(-1, x.shape[-1]).float().mT.contiguous()
        inputs = len(x_IT)
        if self._sum_II is None:
            self._sum_II = torch.zeros(inputs, inputs, device=x.device)
        for start in range(0, inputs, STRIP):
            end = min(start + STRIP, inputs)
            self._sum_II[start:end, :end] += product(x_IT[start:end], x_IT[:end])

    def matrix(self) -> Tensor:
        """float32 [I, I]."""
        assert self._sum_II is not None, "no tokens seen"
        return self._sum_II.tril() + self._sum_II.tril(-1).mT
