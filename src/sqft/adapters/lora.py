"""Plain LoRA of elastic rank, and what all of sqft's layers share: which adapters they take, the rank that is set, the
factors cut to it, and their scale.

Shape letters: O output features, I input features, R rank.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor

from sqft.adapters.config import check_options
from sqft.adapters.kinds import LORA, Kind, kind_of
from sqft.errors import SqftError, UsageError
from sqft.quantization.linear import QuantLinear


def check_adapter(layer: Any, config: Any) -> None:
    """What must hold for every adapter that PEFT puts on our layers. Raises UsageError for an option that
    the layer would ignore, SqftError for another kind than the layer's adapters: it would be computed as they are."""
    kind: Kind = kind_of(config, isinstance(layer.get_base_layer(), QuantLinear))
    if layer.lora_A and kind != layer.kind:
        raise SqftError(
            f"an adapter of kind {kind.name} cannot stand beside one of kind {layer.kind.name} on one layer, which "
            "would compute both alike: put it on a base of its own"
        )
    check_options(config)
    space = getattr(config, "search_space", None)
    if space and not config.rank_groups and config.r != max(space):
        raise UsageError(f"r is {config.r} and the largest rank of search_space {max(space)}: an elastic adapter's are "
                         "equal: attach it by sqft.attach, or combine what sqft.extract wrote")  # fmt: skip
    layer.kind = kind


def active_rank(layer: Any, adapter: str) -> int:
    """The rank that a layer computes with."""
    return getattr(layer, "sqft_ranks", {}).get(adapter, layer.r[adapter])


def set_rank(layer: Any, adapter: str, rank: int, own_scaling: bool) -> None:
    """Sets the rank that a layer computes with, and how many times the scale of its full rank the scale is then: once,
    or with ``own_scaling`` R / r times (rsLoRA: sqrt(R / r) times)."""
    times = layer.r[adapter] / rank if own_scaling else 1.0
    times = math.sqrt(times) if layer.use_rslora[adapter] else times
    layer.sqft_ranks = {**getattr(layer, "sqft_ranks", {}), adapter: rank}
    layer.sqft_scales = {**getattr(layer, "sqft_scales", {}), adapter: times}


def scale_of(layer: Any, adapter: str) -> float:
    """What a layer multiplies B A of its active rank r with: alpha / R of its full rank R, or alpha / r where
    sub-adapters have scales of their own (rsLoRA: the root of the rank)."""
    return layer.scaling[adapter] * getattr(layer, "sqft_scales", {}).get(adapter, 1.0)


def factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A [r, I] and B [O, r] of a layer's active rank r: views, so that gradients reach the super-adapter."""
    a, b = cast(Tensor, layer.lora_A[adapter].weight), cast(Tensor, layer.lora_B[adapter].weight)
    if a.shape[0] != layer.r[adapter]:
        raise SqftError(f"an adapter of rank {a.shape[0]} was swapped in for '{adapter}' of rank {layer.r[adapter]}, "
                        "which would cut it: load it under a name of its own (load_adapter)")  # fmt: skip
    r = active_rank(layer, adapter)
    return (a, b) if r == a.shape[0] else (a[:r], b[:, :r])


class ElasticLora(LoraLinear):
    """Plain LoRA whose rank can be set; on a float base, or with ``QuantLoraLinear`` on a packed one."""

    kind = LORA

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
        check_adapter(self, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        whole = all(factors(self, name)[0].shape[0] == self.r[name] for name in active)
        if whole or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise SqftError("elastic adapters cannot be mixed within a batch: extract a sub-adapter of each")
        y = self.base_layer(x)
        for name in active:
            a, b = factors(self, name)
            dropped = self.lora_dropout[name](self._cast_input_dtype(x, a.dtype))
            y = y + (F.linear(F.linear(dropped, a), b) * scale_of(self, name)).to(y.dtype)
        return y

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s B A`` of the active rank and its scale, [O, I]."""
        a, b = factors(self, adapter)
        return scale_of(self, adapter) * b @ a
