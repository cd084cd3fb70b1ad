"""A live model held in the form in which it computes fastest while it is scored, and put back exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sqft.adapters.kinds import layer_kind
from sqft.adapters.peft_bridge import adapter_layers, is_masked
from sqft.formats.checkpoint import packed_layers, unpack_model
from sqft.models.weights import put_module


@contextlib.contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Holds packed weights de-quantized, and masked adapters merged, for a while: the same results, much faster.

    Every token of a generation would otherwise build the weights anew. Both are undone exactly; adapters that were
    merged before stay merged.
    """
    layers: list[Any] = list(adapter_layers(model).values()) if is_masked(model) else []
    if any(layer.merged for layer in layers):
        layers = []
    packed = packed_layers(model)
    weights = {layer: layer.get_base_layer().weight.data for layer in layers if not layer_kind(layer).packed}
    try:
        if layers:
            model.merge_adapter()
        unpack_model(model)
        yield
    finally:
        for name, module in packed.items():
            put_module(model, name, module)
        for layer in layers:
            if layer in weights:  # subtracting the adapter again would round
                layer.get_base_layer().weight.data = weights[layer]
                layer.merged_adapters.clear()
            elif layer.merged:
                layer.unmerge()
