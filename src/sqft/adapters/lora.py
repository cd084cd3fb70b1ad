"""Plain LoRA of elastic rank, and what all elastic layers share: the rank that is set, and the factors cut to it.

Shape letters: O output features, I input features, R rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor


def active_rank(layer: Any, adapter: str) -> int:
    """The rank that a layer computes with."""
    return getattr(layer, "sqft_ranks", {}).get(adapter, layer.r[adapter])


def factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A [r, I] and B [O, r] of a layer's active rank r: views, so that gradients reach the super-adapter."""
    a, b = cast(Tensor, layer.lora_A[adapter].weight), cast(Tensor, layer.lora_B[adapter].weight)
    r = active_rank(layer, adapter)
    return (a, b) if r == a.shape[0] else (a[:r], b[:, :r])


class ElasticLora(LoraLinear):
    """Plain LoRA whose rank can be set; on a float base, or with ``QuantLoraLinear`` on a packed one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        whole = all(active_rank(self, name) == self.r[name] for name in active)
        if whole or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x)
        for name in active:
            a, b = factors(self, name)
            dropped = self.lora_dropout[name](self._cast_input_dtype(x, a.dtype))
            y = y + (F.linear(F.linear(dropped, a), b) * self.scaling[name]).to(y.dtype)
        return y

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``alpha / R * B A`` of the active rank, [O, I]."""
        a, b = factors(self, adapter)
        return self.scaling[adapter] * b @ a
