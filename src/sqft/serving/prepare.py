"""``prepare``: puts the fastest layers that this machine has in the place of a model's linear ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from sqft.formats.checkpoint import unpack_layer
from sqft.kernels.cpu.library import library
from sqft.models.weights import Weight, linear_weights, put_module
from sqft.quantization.linear import QuantLinear
from sqft.serving.layers import CompactLinear, Int4Linear

HALVES = (torch.float16, torch.bfloat16)


@torch.no_grad()
def prepare(model: Any) -> dict[str, int]:
    """Makes a live model on a CPU ready to answer, and only that; returns how many layers it put in, by kind.

    Sparse weights, and INT ones of 4 or 8 bits, become ``CompactLinear``; without a compiler INT4 ones ``Int4Linear``,
    and other packed weights are unpacked once. If there are any, the model computes in float32, and the head's weight
    is rounded to float16 unless it is in half precision.
    """
    if next(model.parameters()).device.type != "cpu":
        return {}
    made: Counter[str] = Counter()
    for weight in list(linear_weights(model)):
        layer = _fastest(weight)
        if layer is not weight.module:
            put_module(model, weight.name, layer)
            made[type(layer).__name__] += 1
    head = model.get_output_embeddings()
    if made["CompactLinear"] and isinstance(head, nn.Linear):
        half = head.weight if head.weight.dtype in HALVES else head.weight.half()
        name = next(name for name, module in model.named_modules() if module is head)
        put_module(model, name, CompactLinear.from_float(half, None, head.bias))
        made["CompactLinear"] += 1
    if made:
        model.float()
    return dict(made)


def _fastest(weight: Weight) -> nn.Module:
    layer: Any = weight.module
    mask = weight.packed_mask
    if isinstance(layer, QuantLinear):
        if layer.bits in (4, 8) and layer.groups_are_contiguous and layer.group_size % 32 == 0 and library():
            return CompactLinear.from_packed(layer, mask)
        return Int4Linear(layer) if Int4Linear.takes(layer) else unpack_layer(layer, torch.float32)
    if mask is not None and isinstance(layer, nn.Linear) and layer.weight.dtype in HALVES and library():
        return CompactLinear.from_float(layer.weight, mask, layer.bias)
    return layer
