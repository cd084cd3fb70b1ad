"""Masks that are there already, of another tool or another model: each takes the place of a ``Pattern``.

Shape letters: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sqft.errors import UsageError
from sqft.kernels.packed import unpack_mask
from sqft.models.reader import SafetensorsReader
from sqft.models.weights import Weight

SUFFIXES = ("", ".weight", ".weight_mask", ".mask")


class Given:
    """The mask of one weight: kept is what is not zero in a tensor of a file, which is read when it is asked for."""

    def __init__(self, reader: SafetensorsReader, tensor: str, weight: Weight) -> None:
        self._reader, self._tensor, self._transposed = reader, tensor, weight.transposed
        (rows, self._columns), found = weight.shape, reader.layout[tensor]
        self._bits = found.dtype == torch.uint8 and tuple(found.shape) == (rows, -(-self._columns // 8))
        if not self._bits and tuple(found.shape) != (weight.shape[::-1] if weight.transposed else weight.shape):
            raise UsageError(f"{tensor} of {reader.folder} is {list(found.shape)}, {weight.name} is "
                             f"{list(weight.shape)}: a mask of another model?")  # fmt: skip

    def kept(self, score_OI: Tensor) -> Tensor:
        """bool [O, I], whatever the scores are."""
        stored = self._reader.get(self._tensor)
        if self._bits:
            return unpack_mask(stored, self._columns).to(score_OI.device)
        return ((stored.mT if self._transposed else stored) != 0).to(score_OI.device)


def given_masks(path: str | Path, weights: Iterable[Weight]) -> dict[str, Given]:
    """The masks that a file or folder has of these weights, by the weights' names; the others stay dense.

    A tensor is named as the linear module, or its parameter, with or without "_mask" or ".mask": booleans, numbers, or
    a model's own weights (then its zeros are the mask), laid out as the weight is; or sqft's, a bit a weight. Raises
    UsageError for a path that has no safetensors, a mask that does not fit its weight, or if there is none.
    """
    if not Path(path).exists():
        raise UsageError(f"mask {path} does not exist: name a .safetensors file, or a folder with one")
    reader = SafetensorsReader(path)
    found: dict[str, Given] = {}
    for weight in weights:
        tensor = next((name for end in SUFFIXES if (name := weight.name + end) in reader.layout), None)
        if tensor is not None:
            found[weight.name] = Given(reader, tensor, weight)
    if not found:
        some = ", ".join(list(reader.layout)[:2]) or "nothing"
        raise UsageError(f"{path} has no mask of any of the weights to prune; it has {some}: masks of another model?")
    return found
