"""What a checkpoint format is, and what its ``quantization_config`` says of the packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sqft.errors import SqftError, shown
from sqft.quantization.linear import QuantLinear

_INTEGERS = (torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Settings:
    """``group_size`` -1 is a whole row; ``version`` tells variants of a format apart ("gptq" and "gptq_v2")."""

    bits: int
    group_size: int
    symmetric: bool
    version: str


@dataclass(frozen=True)
class Format:
    """Checkpoint tensors to and from packed layers. Registered (``registry.FORMATS``) by its ``quant_method``.

    ``key``: the tensor that says that a module is packed. ``versions``: variants, the usual one first.
    ``encode(layer, version)`` gives a layer's tensors by their names in the module, ``decode(module, tensors,
    settings)`` the layer; ``read_config(quantization_config)`` and ``make_config(layers by name, names of linear
    modules that stay float, version)`` are for ``config.json``. They raise SqftError for what they do not read.
    """

    key: str
    versions: Sequence[str]
    encode: Callable[[QuantLinear, str], dict[str, Tensor]]
    decode: Callable[[str, Mapping[str, Tensor], Settings], QuantLinear]
    read_config: Callable[[Mapping[str, Any]], Settings]
    make_config: Callable[[Mapping[str, QuantLinear], Sequence[str], str], dict[str, Any]]


def take(tensors: Mapping[str, Tensor], name: str, module: str, dimensions: int, key: str = "") -> Tensor:
    """A module's tensor, which ``tensors`` has as ``key``. Raises SqftError if the checkpoint lacks it, or it has not
    so many dimensions."""
    found = tensors.get(key or name)
    if found is None:
        raise SqftError(f"the checkpoint has no {module}.{name}: it is incomplete")
    if found.ndim != dimensions:
        shape = tuple(found.shape)
        raise SqftError(f"{module}.{name} is {shape}, expected {dimensions} dimensions: the file is corrupt")
    return found


def group_columns(module: str, inputs: int, group_size: int) -> int:
    """Columns a group. Raises SqftError if groups do not divide the inputs: a shorter last group is not read."""
    size = inputs if group_size == -1 else group_size
    if inputs < 1:
        raise SqftError(f"{module} has {inputs} inputs: the file is corrupt")
    if size < 1 or inputs % size:
        raise SqftError(
            f"{module}: group size {group_size} does not divide its {inputs} inputs, and a shorter last group is not "
            "read: quantize the model again with a group size that divides them"
        )
    return size


def whole_number(config: Mapping[str, Any], key: str) -> int:
    """A number of ``quantization_config``. Raises SqftError if it is missing, or none."""
    value = need(config, key)
    if type(value) is not int:
        raise SqftError(f"{key} of quantization_config is {shown(repr(value))}: it has to be a whole number")
    return value


def make_layer(module: str, settings: Settings, words: Mapping[str, Tensor], tensors: Mapping[str, Tensor],
               inputs: int, g_idx: str) -> QuantLinear:  # fmt: skip
    """The layer of ``words`` (qweight, qzeros and scales in ``QuantLinear``'s layout), with the checkpoint's bias and
    groups (its tensor ``g_idx``), if it has them. Raises SqftError unless every column belongs to one of the groups."""
    groups, outputs = words["scales"].shape
    columns = torch.arange(inputs, dtype=torch.int32) // (inputs // groups)
    group_I = tensors.get(g_idx, columns)
    check_groups(module, g_idx, group_I, inputs, groups)
    bias = {"bias": tensors["bias"]} if "bias" in tensors else {}
    if bias:
        expect(module, "bias", bias["bias"], (outputs,), False)
    layer = QuantLinear(inputs, outputs, settings.bits, settings.group_size, bool(bias), device="meta")
    layer.symmetric = settings.symmetric
    layer.load_state_dict({**words, "g_idx": group_I.to(torch.int32), **bias}, assign=True)
    return layer


def check_groups(module: str, name: str, group_I: Tensor, inputs: int, groups: int) -> None:
    """Raises SqftError unless every column belongs to one of the groups."""
    expect(module, name, group_I, (inputs,), True)
    if group_I.device.type == "meta":
        return
    low, high = (int(value) for value in group_I.aminmax())
    if low < 0 or high >= groups:
        raise SqftError(f"{module}.{name} goes from {low} to {high}, expected 0 to {groups - 1}: the file is corrupt")


def expect(module: str, name: str, tensor: Tensor, shape: tuple[int, ...], integer: bool) -> None:
    """Raises SqftError if a packed tensor has not the shape and kind that the settings ask for."""
    if tuple(tensor.shape) != shape or tensor.dtype not in (_INTEGERS if integer else _FLOATS):
        kind = "int32" if integer else "float"
        raise SqftError(
            f"{module}.{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {kind} {shape}: the file is corrupt, "
            "or quantization_config in config.json does not belong to it"
        )


def need(config: Mapping[str, Any], key: str) -> Any:
    """A value of ``quantization_config``. Raises SqftError if it is missing."""
    if not isinstance(config, Mapping):
        raise SqftError(
            f"quantization_config has {shown(repr(config))} where a mapping belongs: config.json is corrupt"
        )
    if key not in config:
        raise SqftError(f"quantization_config has no '{key}': config.json is incomplete")
    return config[key]
