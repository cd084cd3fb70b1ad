"""What methods can ask to know of a weight. Shape letters: T tokens, O output features, I input features.

A statistic of inputs is made for each input of a block (by the name of the first layer that takes it), is given the
calibration tokens batch by batch and then asked for its value; a ``Gradient`` is of the whole model before the walk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sqft.errors import SqftError
from sqft.kernels.dispatch import product
from sqft.models.weights import Weight
from sqft.processes import total

STRIP = 256  # rows of a Hessian that are computed at once


def widest(device: torch.device) -> torch.dtype:
    """The widest float that a device computes with: float64, but for Apple's."""
    return torch.float32 if device.type == "mps" else torch.float64


class Sum:
    """A sum of what batches of tokens give, over the batches of all processes.

    Each batch's part is float32, and the sum float64: it is exact as long as an element's parts lie within 2^29 of each
    other but for their number, and of what is lost beyond that the rounding to float32 leaves nothing to be seen, so
    that neither the order of the batches nor the process that has one matters.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._whole = False

    def add(self, part: Tensor, shape: tuple[int, ...] = (), place: Any = ...) -> None:
        """Adds a float32 part, at a place of a sum of another shape."""
        if self._sum is None:
            self._sum = torch.zeros(shape or part.shape, dtype=widest(part.device), device=part.device)
        self._sum[place] += part

    def value(self) -> Tensor:
        """float32. The first one who asks waits for all processes."""
        assert self._sum is not None, "no tokens seen"
        if not self._whole:
            self._sum, self._whole = total(self._sum).to(torch.float32), True
        return self._sum


class ColumnNorms:
    """L2 norm of every input feature over all tokens seen."""

    def __init__(self, name: str = "a layer") -> None:
        self._name, self._squares_I = name, Sum()

    def update(self, x: Tensor) -> None:
        """Adds tokens; x: [..., I]."""
        x_TI = x.reshape(-1, x.shape[-1]).float()
        self._squares_I.add(x_TI.square().sum(0, dtype=widest(x.device)).float())

    def value(self) -> Tensor:
        """float64 [I]. Raises SqftError if an input was infinite or not a number."""
        squares_I = _finite(self._squares_I.value(), self._name)
        return squares_I.to(widest(squares_I.device)).sqrt()


class Hessian:
    """``X^T X`` over all tokens seen: GPTQ's Hessian up to a factor. It is symmetric: of each strip of rows only the
    part up to the diagonal is computed."""

    def __init__(self, name: str = "a layer") -> None:
        self._name, self._lower_II = name, Sum()

    def update(self, x: Tensor) -> None:
        """Adds tokens; x: [..., I]."""
        x_IT = x.reshape(-1, x.shape[-1]).float().mT.contiguous()
        inputs = len(x_IT)
        for start in range(0, inputs, STRIP):
            end = min(start + STRIP, inputs)
            place = slice(start, end), slice(0, end)
            self._lower_II.add(product(x_IT[start:end], x_IT[:end]), (inputs, inputs), place)

    def value(self) -> Tensor:
        """float32 [I, I], not to be changed. Raises SqftError if an input was infinite or not a number."""
        h_II = self._lower_II.value()
        _finite(h_II.diagonal(), self._name)
        for start in range(0, len(h_II), STRIP):  # mirrored in its place
            strip = slice(start, start + STRIP)
            square = h_II[strip, strip]
            square.copy_(square.tril() + square.tril(-1).mT)
            h_II[strip, start + STRIP :] = h_II[start + STRIP :, strip].mT
        return h_II


class Products:
    """``X^^T X^`` and ``X^T X^``: X^ are the inputs that the changed model gives, X those of the un-changed one."""

    paired = True  # it is to be given both models' inputs

    def __init__(self, name: str = "a layer") -> None:
        self._hessian, self._cross_II = Hessian(name), Sum()

    def update(self, x: Tensor, dense_x: Tensor) -> None:
        """Adds tokens; both: [..., I]."""
        self._hessian.update(x)
        x_TI, dense_TI = (v.reshape(-1, v.shape[-1]).float() for v in (x, dense_x))
        self._cross_II.add(product(dense_TI.mT.contiguous(), x_TI.mT.contiguous()))

    def hessian(self) -> Tensor:
        """As ``Hessian.value``."""
        return self._hessian.value()

    def value(self) -> tuple[Tensor, Tensor]:
        """Both, float32 [I, I]. Raises SqftError if an input was infinite or not a number."""
        return self.hessian(), self._cross_II.value()


class Paired:
    """What a method ``needs`` to know of the changed model's inputs, and ``Products`` besides."""

    def __init__(self, needs: Any, name: str) -> None:
        self._products, self._needs = Products(name), needs
        self._own = needs(name) if needs and needs not in (Hessian, Products) else None

    def update(self, x: Tensor, dense_x: Tensor) -> None:
        """Adds tokens; both: [..., I]."""
        self._products.update(x, dense_x)
        if self._own is not None:
            self._own.update(x, *([dense_x] if is_paired(self._needs) else []))

    def value(self) -> Any:
        if self._needs is Hessian:
            return self._products.hessian()
        own = self._products if self._needs is Products else self._own
        return None if own is None else own.value()

    def products(self) -> tuple[Tensor, Tensor]:
        """``X^^T X^`` and ``X^T X^``, float32 [I, I]. Raises SqftError if an input was infinite or not a number."""
        return self._products.value()


def is_paired(needs: Any) -> bool:
    """Whether a statistic is of the un-changed model's inputs too."""
    return getattr(needs, "paired", False)


class Gradient:
    """Squared gradients of the model's loss with respect to a weight, summed over the calibration blocks."""

    def __init__(self, weight: Weight) -> None:
        self._name, self._sum_OI = weight.name, torch.zeros(weight.shape, device=weight.device)

    def update(self, gradient_OI: Tensor) -> None:
        self._sum_OI += gradient_OI.float().square()

    def value(self) -> Tensor:
        """float32 [O, I]. Raises SqftError if a gradient was infinite or not a number."""
        return _finite(self._sum_OI, self._name)


def gradients(model: Any, weights: Sequence[Weight], tokens_NT: Tensor) -> dict[str, Gradient]:
    """A ``Gradient`` of each float weight, by name, of the model as it is: one backward pass a calibration block.

    The model is computed where it lies, in the memory of the weights twice more and what a backward pass keeps. Raises
    SqftError for a model whose weights accelerate has off-loaded.
    """
    parameters = {id(weight.parameter): weight.parameter for weight in weights}
    if any(parameter.device.type == "meta" for parameter in parameters.values()):
        raise SqftError("gradients need all of the model in memory: load it without off-loading")
    before = [parameter.requires_grad for parameter in parameters.values()]
    found = {weight.name: Gradient(weight) for weight in weights}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for block_T in tqdm(tokens_NT, desc="Gradients", unit="block", disable=None):
            block_NT = block_T[None].to(model.device)
            with torch.enable_grad():
                loss = model(input_ids=block_NT, labels=block_NT, use_cache=False).loss
            given = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            wholes = dict(zip(parameters, given, strict=True))
            for weight in weights:
                found[weight.name].update(weight.part(wholes[id(weight.parameter)]))
    finally:
        for parameter, required in zip(parameters.values(), before, strict=True):
            parameter.requires_grad_(required)
    return found


def _finite(values: Tensor, name: str) -> Tensor:
    if not torch.isfinite(values).all():
        raise SqftError(f"the calibration activations of {name} are not finite (inf or NaN): use --dtype float32, or "
                        "other calibration text")  # fmt: skip
    return values
