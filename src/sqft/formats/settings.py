"""What a checkpoint's ``quantization_config`` says of its packed weights, whatever the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sqft.errors import SqftError


@dataclass(frozen=True)
class Settings:
    """``group_size`` -1 is a whole row; ``version`` tells variants of a format apart ("gptq" and "gptq_v2")."""

    bits: int
    group_size: int
    symmetric: bool
    version: str


def take(tensors: Mapping[str, Tensor], name: str, module: str, dimensions: int) -> Tensor:
    """A module's tensor. Raises SqftError if the checkpoint lacks it, or it has not so many dimensions."""
    if name not in tensors:
        raise SqftError(f"the checkpoint has no {module}.{name}: it is incomplete")
    if tensors[name].ndim != dimensions:
        shape = tuple(tensors[name].shape)
        raise SqftError(f"{module}.{name} is {shape}, expected {dimensions} dimensions: the file is corrupt")
    return tensors[name]


def group_columns(module: str, inputs: int, group_size: int) -> int:
    """Columns a group. Raises SqftError if groups do not divide the inputs: a shorter last group is not read."""
    size = inputs if group_size == -1 else group_size
    if size < 1 or inputs % size:
        raise SqftError(
            f"{module}: group size {group_size} does not divide its {inputs} inputs, and a shorter last group is not "
            "read: quantize the model again with a group size that divides them"
        )
    return size


def check_groups(module: str, name: str, group_I: Tensor, inputs: int, groups: int) -> None:
    """Raises SqftError unless every column belongs to one of the groups."""
    expect(module, name, group_I, (inputs,), True)
    low, high = (int(value) for value in group_I.aminmax())
    if low < 0 or high >= groups:
        raise SqftError(f"{module}.{name} goes from {low} to {high}, expected 0 to {groups - 1}: the file is corrupt")


def expect(module: str, name: str, tensor: Tensor, shape: tuple[int, ...], integer: bool) -> None:
    """Raises SqftError if a packed tensor has not the shape and kind that the settings ask for."""
    if tuple(tensor.shape) != shape or tensor.dtype.is_floating_point == integer:
        kind = "int32" if integer else "float"
        raise SqftError(
            f"{module}.{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {kind} {shape}: the file is corrupt, "
            "or quantization_config in config.json does not belong to it"
        )


def need(config: Mapping[str, Any], key: str) -> Any:
    """A value of ``quantization_config``. Raises SqftError if it is missing."""
    if key not in config:
        raise SqftError(f"quantization_config has no '{key}': config.json is incomplete")
    return config[key]
