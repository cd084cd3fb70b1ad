"""GPTQ checkpoints: ``QuantLinear``'s own layout, but for the zero points of version 1.

Version 1 ("gptq") stores zero - 1: as AutoGPTQ wrote it, 1 in each field is subtracted from the whole 32-bit word, so
that a zero point 0 borrows from the next field; adding it to the word again gives everything back. At 3 bits, where
fields cross words, GPTQModel shifts each field by itself. Version 2 ("gptq_v2") stores the zero points as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sqft.errors import SqftError
from sqft.formats.settings import Format, Settings, expect, group_columns, make_layer, take, whole_number
from sqft.kernels.packed import pack_words, unpack_words, word_count
from sqft.quantization.linear import QuantLinear

VERSIONS = ("gptq", "gptq_v2")


def encode(layer: QuantLinear, version: str) -> dict[str, Tensor]:
    """A layer's tensors as the checkpoint holds them, by their names in the module."""
    tensors = {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}
    if version == "gptq":
        tensors["qzeros"] = _shift(tensors["qzeros"], layer.bits, layer.out_features, -1)
    return tensors


def decode(module: str, tensors: Mapping[str, Tensor], settings: Settings) -> QuantLinear:
    """The layer of a checkpoint's tensors, any ``g_idx``. Raises SqftError if they do not fit the settings."""
    bits = settings.bits
    qweight, scales = take(tensors, "qweight", module, 2), take(tensors, "scales", module, 2)
    # The last word may be partly empty: only g_idx has the width itself.
    inputs = take(tensors, "g_idx", module, 1).numel() if "g_idx" in tensors else qweight.shape[0] * 32 // bits
    groups, outputs = inputs // group_columns(module, inputs, settings.group_size), scales.shape[1]
    qzeros = take(tensors, "qzeros", module, 2)
    expect(module, "qweight", qweight, (word_count(inputs, bits), outputs), True)
    expect(module, "scales", scales, (groups, outputs), False)
    expect(module, "qzeros", qzeros, (groups, word_count(outputs, bits)), True)
    qzeros = _shift(qzeros, bits, outputs, 1) if settings.version == "gptq" else qzeros
    words = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    return make_layer(module, settings, words, tensors, inputs, "g_idx")


def _shift(qzeros: Tensor, bits: int, outputs: int, by: int) -> Tensor:
    """Adds ``by`` (1 or -1) to all zero points, by whole words or, at 3 bits, by field."""
    if bits == 3:
        fields = (unpack_words(qzeros.mT, outputs, bits) + by) & (2**bits - 1)
        return pack_words(fields, bits).mT.contiguous()
    ones = sum(1 << shift for shift in range(0, 32, bits))
    words = (qzeros.long() + by * ones) & 0xFFFFFFFF
    return (words - ((words >> 31) << 32)).to(torch.int32)


def read_config(config: Mapping[str, Any]) -> Settings:
    """The settings of a ``quantization_config``. Raises SqftError for a variant that is not read."""
    version = config.get("checkpoint_format", config.get("format", "gptq"))
    if version not in VERSIONS:
        raise SqftError(f"GPTQ checkpoint format '{version}' is not read, only gptq and gptq_v2: convert it first")
    rules = config.get("dynamic") or {}
    if not isinstance(rules, Mapping) or any(not rule.startswith("-:") for rule in rules):
        raise SqftError("this GPTQ checkpoint has other bits or groups for some modules ('dynamic'), which is not read")
    bits = whole_number(config, "bits")
    if bits not in (2, 3, 4, 8):
        raise SqftError(f"GPTQ weights of {bits} bits are not read, only of 2, 3, 4 and 8")
    return Settings(bits, whole_number(config, "group_size"), bool(config.get("sym", True)), version)


def make_config(layers: Mapping[str, QuantLinear], float_linears: Iterable[str], version: str) -> dict[str, Any]:
    """``quantization_config`` of packed layers by name; ``float_linears``: linear modules of blocks that stay float."""
    first = next(iter(layers.values()))
    config: dict[str, Any] = {
        "quant_method": "gptq", "checkpoint_format": version, "bits": first.bits, "sym": first.symmetric,
        "group_size": first.stored_group_size,
        # True only where a column's group is not given by its place
        "desc_act": not all(layer.groups_are_contiguous for layer in layers.values()),
        "lm_head": False, "pack_dtype": "int32",
    }  # fmt: skip
    rules = {f"-:^{re.escape(name)}$": {} for name in float_linears}
    # GPTQModel heeds "dynamic", and transformers the other, whose names may be whole ones.
    return config | ({"dynamic": rules, "modules_in_block_to_quantize": [list(layers)]} if rules else {})


GPTQ = Format("qweight", VERSIONS, encode, decode, read_config, make_config)
