"""float16 and bfloat16 on a CPU that has no units for them, where torch's products take several times as long as in
float32: they are computed in float32, and rounded once, to the half that was asked for. Weights stay what they are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqft.kernels.dispatch import is_slow_half, product


class _Product(torch.autograd.Function):
    """``x w^T + bias`` of a frozen weight, which is widened anew for the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(w_OI)
        y_TO = product(x.reshape(-1, x.shape[-1]), w_OI, bias_O)
        return y_TO.view(*x.shape[:-1], len(w_OI))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (w_OI,) = ctx.saved_tensors
        dx_TI = product(dy.reshape(-1, dy.shape[-1]).contiguous(), w_OI.mT)
        return dx_TI.view(*dy.shape[:-1], w_OI.shape[1]), None, None


@contextlib.contextmanager
def fast_halves(model: nn.Module) -> Iterator[None]:
    """Lets the linear layers of ``model`` that lie on such a CPU in half precision multiply in float32 meanwhile."""
    slow: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and "forward" not in vars(module)
        and module.weight.device.type == "cpu" and is_slow_half(module.weight.dtype)
    ]  # fmt: skip
    for linear in slow:
        linear.forward = functools.partial(_forward, linear)
    try:
        yield
    finally:
        for linear in slow:
            del linear.forward


def _forward(linear: nn.Linear, x: Tensor) -> Tensor:
    trained = linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad)
    if (trained and torch.is_grad_enabled()) or x.dtype != linear.weight.dtype:
        return F.linear(x, linear.weight, linear.bias)
    return _Product.apply(x, linear.weight, linear.bias)  # pyright: ignore[reportReturnType]
