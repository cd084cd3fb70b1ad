"""compressed-tensors' ``pack-quantized`` checkpoints (vLLM, llm-compressor).

The integers are ours (signed ones plus 2^(bits - 1)), packed along the input in rows: ``weight_packed`` int32
[O, I * bits / 32] is the transpose of our words, ``weight_zero_point`` int32 [O * bits / 32, G] that of our zero
points, ``weight_scale`` [O, G] that of our scales. ``weight_shape`` holds (O, I); ``weight_g_idx`` the groups, which
compressed-tensors 0.19 and newer refuse. (Versions that did not pack 3 bits densely give other shapes: refused.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sqft.errors import SqftError, shown
from sqft.formats.settings import Format, Settings, expect, group_columns, make_layer, need, take, whole_number
from sqft.kernels.packed import pack_words, word_count
from sqft.quantization.linear import QuantLinear

VERSION = "pack-quantized"


def encode(layer: QuantLinear, version: str = VERSION) -> dict[str, Tensor]:
    """A layer's tensors as the checkpoint holds them, by their names in the module."""
    tensors = {
        "weight_packed": layer.qweight.mT.contiguous(),
        "weight_scale": layer.scales.mT.contiguous(),
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }
    if not layer.symmetric:
        tensors["weight_zero_point"] = layer.qzeros.mT.contiguous()
    if not layer.groups_are_contiguous:
        tensors["weight_g_idx"] = layer.g_idx
    return tensors | ({} if layer.bias is None else {"bias": layer.bias.detach()})


def decode(module: str, tensors: Mapping[str, Tensor], settings: Settings) -> QuantLinear:
    """The layer of a checkpoint's tensors. Raises SqftError if they do not fit the settings."""
    bits = settings.bits
    shape = take(tensors, "weight_shape", module, 1)
    expect(module, "weight_shape", shape, (2,), True)
    outputs, inputs = map(int, shape)
    groups = inputs // group_columns(module, inputs, settings.group_size)
    packed, scale = take(tensors, "weight_packed", module, 2), take(tensors, "weight_scale", module, 2)
    expect(module, "weight_packed", packed, (outputs, word_count(inputs, bits)), True)
    expect(module, "weight_scale", scale, (outputs, groups), False)
    if settings.symmetric:
        qzeros = pack_words(torch.full((outputs, groups), 2 ** (bits - 1)), bits)
    else:
        qzeros = take(tensors, "weight_zero_point", module, 2)
        expect(module, "weight_zero_point", qzeros, (word_count(outputs, bits), groups), True)
    if scale.dtype == torch.float32:  # as float16 if that loses nothing: half the size
        scale = half if torch.equal((half := scale.half()).float(), scale) else scale
    # The words stay where they lie, as pages of a mapped file: only their order is another.
    words = {"qweight": packed.mT, "qzeros": qzeros.mT.contiguous(), "scales": scale.mT.contiguous()}
    return make_layer(module, settings, words, tensors, inputs, "weight_g_idx")


def read_config(config: Mapping[str, Any]) -> Settings:
    """The settings of a ``quantization_config``. Raises SqftError for a variant that is not read."""
    named = need(config, "config_groups")
    groups = list(named.values()) if isinstance(named, Mapping) else [named]
    formats = {str(one.get("format")) for one in (config, *groups) if isinstance(one, Mapping)} - {"None"}
    if formats != {VERSION} or len(groups) != 1:
        raise SqftError(f"a compressed-tensors checkpoint of format {', '.join(map(str, formats))} with {len(groups)} "
                        "groups is not read: only pack-quantized with one group")  # fmt: skip
    weights = need(groups[0], "weights")
    if groups[0].get("input_activations") or need(weights, "type") != "int":
        raise SqftError("this checkpoint quantizes activations, or to floats: only integer weights are read")
    strategy, bits = need(weights, "strategy"), whole_number(weights, "num_bits")
    if strategy not in ("group", "channel"):
        raise SqftError(f"quantization strategy '{shown(strategy)}' is not read, only group and channel")
    if bits not in (2, 3, 4, 8):
        raise SqftError(f"pack-quantized weights of {bits} bits are not read, only of 2, 3, 4 and 8")
    size = -1 if strategy == "channel" else whole_number(weights, "group_size")
    return Settings(bits, size, bool(need(weights, "symmetric")), VERSION)


def make_config(layers: Mapping[str, QuantLinear], float_linears: Iterable[str], version: str) -> dict[str, Any]:
    """``quantization_config`` of packed layers by name; ``float_linears``: linear modules of blocks that stay float."""
    first = next(iter(layers.values()))
    size = first.stored_group_size
    scrambled = not all(layer.groups_are_contiguous for layer in layers.values())
    weights = {
        "num_bits": first.bits, "type": "int", "symmetric": first.symmetric, "dynamic": False, "observer": "minmax",
        "strategy": "channel" if size == -1 else "group", "group_size": None if size == -1 else size,
        "actorder": "group" if scrambled else None, "block_structure": None, "observer_kwargs": {},
    }  # fmt: skip
    group = {"targets": ["Linear"], "format": VERSION, "weights": weights, "input_activations": None,
             "output_activations": None}  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": VERSION, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head", *float_linears], "kv_cache_scheme": None,
    }  # fmt: skip


COMPRESSED_TENSORS = Format("weight_packed", (VERSION,), encode, decode, read_config, make_config)
