"""Streaming statistics of a linear layer's inputs. Shape letters: T tokens, I input features."""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.kernels.dispatch import product


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
    """``X^T X`` over all tokens seen: GPTQ's Hessian up to a factor, summed in float32."""

    def __init__(self) -> None:
        self._sum_II: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Adds tokens; x: [..., I]."""
        x_IT = x.reshape(-1, x.shape[-1]).float().mT
        squares_II = product(x_IT, x_IT)
        self._sum_II = squares_II if self._sum_II is None else self._sum_II.add_(squares_II)

    def matrix(self) -> Tensor:
        """float32 [I, I]."""
        assert self._sum_II is not None, "no tokens seen"
        return self._sum_II
