"""``prepare``: puts the fastest layers that this machine has in the place of a model's linear ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqft.artifact import check_input
from sqft.folders import load
from sqft.formats.checkpoint import load_weights, unpack_layer
from sqft.formats.compact import CompactReader, is_compact
from sqft.kernels.compact import pack
from sqft.kernels.cpu.library import library, stores_zeros
from sqft.kernels.dispatch import has_kernel, pick_device
from sqft.models.dense import load_tokenizer
from sqft.models.discover import input_device
from sqft.models.embeddings import HALVES
from sqft.models.types import Tokenizer
from sqft.models.weights import Weight, linear_weights, put_module
from sqft.quantization.linear import QuantLinear
from sqft.serving.layers import CompactLinear, Int4Linear, Serving, all_ones
from sqft.sparsity.masks import attach_masks


def load_prepared(source: str | Path, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Tokenizer]:
    """``load``, then ``prepare``. The weights of a compact folder are taken as they lie in the file."""
    if not (is_compact(source) and pick_device(device).type == "cpu" and library()):
        model, tokenizer = load(source, dtype=dtype, device=device)
        prepare(model)
        return model, tokenizer
    check_input(source)
    reader = CompactReader(source)
    found = {module: _compact_layer(reader, module) for module in reader.modules}
    ready = {module: layer for module, layer in found.items() if layer is not None}
    model = load_weights(reader, dtype, reader.config, ready)
    attach_masks(model, {name: mask for name, mask in reader.masks().items() if name not in ready})
    prepare(model)
    return model, load_tokenizer(source)


def _compact_layer(reader: CompactReader, module: str) -> CompactLinear | None:
    """None: its kind has no kernel, or a mask would have to be kept."""
    compact = reader.compact(module)
    if not reader.bits:
        bias = reader.get(f"{module}.bias") if f"{module}.bias" in reader.layout else None
        return CompactLinear(compact, None, None, 0, bias) if compact.values.dtype in HALVES else None
    layer = reader.grid_layer(module)
    if layer.bits not in (4, 8) or not layer.groups_are_contiguous or layer.group_size % 32:
        return None
    grid = layer.grid()
    if stores_zeros(layer.bits, layer.group_size):
        compact = pack(reader.integers(module, grid), all_ones(layer.out_features, layer.in_features), layer.bits)
    return CompactLinear(compact, grid.scale_OG, grid.zero_OG, layer.group_size, layer.bias)


@torch.no_grad()
def prepare(model: Any) -> dict[str, int]:
    """Makes a live model ready to answer, and only that; returns how many layers it put in, by kind.

    Sparse weights, and INT ones of 4 or 8 bits, become ``CompactLinear`` where the device has a kernel for it. On a CPU
    without a compiler INT4 ones become ``Int4Linear``, and other packed weights are unpacked once; and if any layer was
    put in, the model computes in float32, and the head's weight is rounded to float16 unless it is in half precision.
    """
    device = input_device(model).type
    fast = bool(library()) if device == "cpu" else has_kernel("compact_linear", device)
    made = Counter("CompactLinear" for module in model.modules() if isinstance(module, CompactLinear))
    for weight in list(linear_weights(model)):
        layer = _fastest(weight, device, fast)
        if layer is not weight.module:
            put_module(model, weight.name, layer)
            made[type(layer).__name__] += 1
    if device != "cpu":
        for module in model.modules():
            if isinstance(module, Serving):
                module.dtype = model.dtype
        return dict(made)
    head = model.get_output_embeddings()
    if made["CompactLinear"] and isinstance(head, nn.Linear):
        half = head.weight if head.weight.dtype in HALVES else head.weight.half()
        name = next(name for name, module in model.named_modules() if module is head)
        bytes_ = CompactLinear.from_rows(half, head.bias)
        put_module(model, name, bytes_ or CompactLinear.from_float(half, None, head.bias))
        made["CompactLinear"] += 1
    if made:
        model.float()
    return dict(made)


def _fastest(weight: Weight, device: str, fast: bool) -> nn.Module:
    layer: Any = weight.module
    mask = weight.packed_mask
    if isinstance(layer, QuantLinear):
        if fast and layer.bits in (4, 8) and layer.groups_are_contiguous and layer.group_size % 32 == 0:
            return CompactLinear.from_packed(layer, mask)
        if device != "cpu":
            return layer
        return Int4Linear(layer) if Int4Linear.takes(layer) else unpack_layer(layer, torch.float32)
    if fast and mask is not None and isinstance(layer, nn.Linear) and layer.weight.dtype in HALVES:
        return CompactLinear.from_float(layer.weight, mask, layer.bias)
    return layer
