"""float16 and bfloat16 on a CPU that has no units for them, where torch's products take several times as long as in
float32: they are computed in float32, and rounded once, to the half that was asked for. Weights stay what they are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqft.kernels.dispatch import is_slow_half, product, widening


class _Product(torch.autograd.Function):
    """``x w^T + bias`` of a frozen weight; where halves are widened, the weight is so anew for the backward pass."""

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
def fast_products(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Lets those of the modules that are linear layers multiply by the fastest library meanwhile."""
    chosen: list[Any] = [each for each in modules if isinstance(each, nn.Linear) and "forward" not in vars(each)]
    for linear in chosen:
        linear.forward = functools.partial(_forward, linear)
    try:
        yield
    finally:
        for linear in chosen:
            del linear.forward


@contextlib.contextmanager
def fast_halves(model: nn.Module) -> Iterator[None]:
    """``fast_products`` of the linear layers of ``model`` that lie on such a CPU in half precision; and what is to
    multiply as ``nn.Linear`` does multiplies so too."""
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    slow = [each for each in linears if each.weight.device.type == "cpu" and is_slow_half(each.weight.dtype)]
    with fast_products(slow), widening():
        yield


def _forward(linear: nn.Linear, x: Tensor) -> Tensor:
    trained = linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad)
    if (trained and torch.is_grad_enabled()) or x.dtype != linear.weight.dtype:
        return F.linear(x, linear.weight, linear.bias)
    return _Product.apply(x, linear.weight, linear.bias)  # pyright: ignore[reportReturnType]
