"""What a ``config.json`` may ask for: no more than its weight files have, before a model of it is built.

A model without weights costs time and memory by its layers, and its tables of positions by their squares; with weights,
each parameter that no file has would be drawn at random.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sqft.errors import SqftError, shown
from sqft.models.reader import SafetensorsReader
from sqft.strict import read_object

RANK = 2**12  # of an adapter
LAYERS, EXPERTS, SIZE, NUMBER = 1024, 4096, 2**24, 2**40  # where no weights say less
LISTED, LENGTH = 2**20, 4096  # of a list its numbers (tokens, say), and how many; of a text its characters
TABLES = 2**28  # bytes of what a model computes for itself, such as a causal mask of all its positions
PACKED = 64  # weights a stored number: of a compact mask a word has so many
_LAYERS = re.compile(r"(num|n)_?.*layers?|(encoder|decoder)_layers|depth|layers|.*pattern\(\)")
_EXPERTS = re.compile(r".*experts")
_SIZES = re.compile(
    r".*(size|dim|width|heads?|rank|channels|inner|length|head_count|head_count_kv|n_embd|d_model|d_state|d_conv|d_inner|"
    r"expand|ratio)"
)
_CODE = re.compile(r"_?(attn|experts)_implementation")


def check_decoder(config: Any) -> None:
    """Raises SqftError for the configuration of a model that is no decoder alone."""
    if getattr(config, "is_encoder_decoder", False):
        raise SqftError(f"{config.model_type} is an encoder-decoder model: sqft works on decoders, whose blocks run "
                        "one after the other")  # fmt: skip


def check_config(folder: str | Path, layout: Mapping[str, Tensor] | None = None) -> None:
    """Raises SqftError for a ``config.json`` that cannot be read, has numbers that no model has, or more layers than
    its weight files (``layout``) have tensors. A folder without one passes: it is a hub name, or GGUF."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        return
    try:
        values = read_object(file, data=True)
        most = LAYERS if layout is None else min(LAYERS, len(layout))
        for name, value in _numbers(values):
            check_number(name, value, most)
        if _product(values) > LAYERS * 256:
            raise ValueError("it has more than 262,144 experts in all layers")
    except (OSError, ValueError) as error:
        raise SqftError(f"{file} cannot be read: {error}") from None


def _numbers(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, and the length of every list and text, by the name of what it is given as."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key != "quantization_config":  # which lists modules; ``formats`` reads it
                yield from _numbers(value, key)
    elif isinstance(values, list):
        yield f"{name}()", len(values)
        for value in values:
            yield from _numbers(value, f"{name}[]")
    elif isinstance(values, str):
        if _CODE.fullmatch(name) and "/" in values:
            raise ValueError(f"{name} is '{shown(values)}': code of the hub, which sqft does not run")
        yield f"{name}()", len(values)
    elif isinstance(values, (int, float)) and not isinstance(values, bool):
        yield name, values


def check_number(name: str, value: float, layers: int) -> None:
    """Raises ValueError for a number that no model has by this name; ``layers`` are the most that it may have."""
    low, most = -NUMBER, NUMBER
    if name.endswith("[]"):
        most = LISTED
    elif isinstance(value, float):
        return
    elif _LAYERS.fullmatch(name):
        low, most = 0, layers
    elif name.endswith("()"):
        most = LENGTH
    elif _EXPERTS.fullmatch(name):
        low, most = 0, EXPERTS
    elif _SIZES.fullmatch(name):
        low, most = -1, SIZE
    if not low <= value <= most:
        raise ValueError(f"{shown(name)} is {shown(value)}: expected {max(low, -1)} to {most}")


def _product(values: Mapping[str, Any]) -> int:
    """The most layers times the most experts."""
    numbers = [(name, value) for name, value in _numbers(values) if type(value) is int]
    layers = max((value for name, value in numbers if _LAYERS.fullmatch(name)), default=1)
    return layers * max((value for name, value in numbers if _EXPERTS.fullmatch(name)), default=1)


def check_adapter(folder: str | Path) -> None:
    """Raises SqftError unless an adapter's weights are a safetensors file, and its ranks no larger than these."""
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise SqftError(f"{folder} has no {file.name}: another kind of file is not loaded; train again, or convert it")
    sizes = [size for tensor in SafetensorsReader(file).layout.values() for size in tensor.shape]
    most = max([RANK, *sizes])
    try:
        for name, value in _numbers(read_object(Path(folder) / "adapter_config.json", data=True)):
            if not name.endswith("()") and abs(value) > most:
                raise ValueError(f"{shown(name)} is {shown(value)}: expected at most {most}, as in its weights")
    except (OSError, ValueError) as error:
        raise SqftError(f"{folder}/adapter_config.json cannot be read: {error}") from None


def check_size(model: nn.Module, folder: str | Path, layout: Mapping[str, Tensor], packed: bool) -> None:
    """Raises SqftError if a model, which lies on the device ``meta``, has more parameters than its weight files, or
    makes larger tables for itself than they are."""
    have = sum(tensor.numel() for tensor in layout.values())
    want = sum(parameter.numel() for parameter in model.parameters())
    if want > have * (PACKED if packed else 1):
        raise SqftError(f"{folder}: config.json says {want:,} parameters, the weight files have {have:,} numbers: they "
                        "do not belong together")  # fmt: skip
    tables = sum(buffer.nbytes for buffer in model.buffers())
    if tables > TABLES + sum(tensor.nbytes for tensor in layout.values()):
        raise SqftError(
            f"{folder}: config.json asks for tables of {tables:,} bytes: its positions are not this model's"
        )
