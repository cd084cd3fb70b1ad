"""A live model held in another state while it is scored, and put back exactly, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from sqft.adapters.kinds import layer_kind
from sqft.adapters.peft_bridge import adapter_layers, is_masked
from sqft.elastic.handle import get_ranks, set_ranks
from sqft.elastic.heuristics import resolve_ranks
from sqft.formats.checkpoint import packed_layers, repack, unpack_model


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Holds a model in eval mode; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def at_ranks(model: Any, choice: str, folder: str | Path | None) -> Iterator[None]:
    """Holds a super-adapter at the ranks that ``choice`` names. Raises UsageError as ``resolve_ranks``."""
    ranks = resolve_ranks(model, choice, folder or "")
    before = get_ranks(model)
    set_ranks(model, ranks)
    try:
        yield
    finally:
        set_ranks(model, before)


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
        repack(model, packed)
        for layer in layers:
            if layer in weights:  # subtracting the adapter again would round
                layer.get_base_layer().weight.data = weights[layer]
                layer.merged_adapters.clear()
            elif layer.merged:
                layer.unmerge()
