"""Adapters on a packed base: QA-SparsePEFT, which merges on the base's own grid, its scales alone, and plain LoRA,
which cannot be merged.

QA-SparsePEFT (SQFT, arXiv 2410.03750, section 3.4; ``kernels/reference.py``) trains through the grid that the merged
weight will be on. W is what the base's integers mean, with what rounding took away if that is beside them
(``QuantLinear.fractions``), or the un-quantized sparse weight they were made from (``float_base``, as in the paper).
Merging stores the integers that training rounded to; nothing else changes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from sqft.adapters.kinds import QA_SPARSE_PEFT, SCALES, SQFT
from sqft.adapters.lora import ElasticLora, factors, scale_of
from sqft.adapters.sparse import MaskedLoraLinear, check_finite
from sqft.errors import SqftError, UsageError
from sqft.kernels.ops import linear, merge_packed, quant_aware_weight
from sqft.kernels.packed import Packed
from sqft.kernels.reference import Adapter
from sqft.quantization.linear import QuantLinear

FLOAT_BASE = "sqft_float_base"  # buffer on a QuantLinear: the un-quantized sparse weight


class QuantAwareLoraLinear(MaskedLoraLinear):
    """QA-SparsePEFT on a ``QuantLinear``."""

    kind = QA_SPARSE_PEFT
    adapter_layer_names = (*LoraLinear.adapter_layer_names, "lora_scales")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._before_merge: list[tuple[Packed, Tensor | None]] = []

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        self.resolve_lora_variant(config=config)
        if (getattr(self._linear, FLOAT_BASE, None) is None) != (not config.float_base):
            raise SqftError(f"the float base of '{adapter_name}' is not beside its layer, or another adapter's is: "
                            "sqft.attach and sqft.load put it there, one for all adapters of a layer")  # fmt: skip
        if not hasattr(self, "lora_scales"):
            self.lora_scales, self._starts = nn.ParameterDict(), {}
        if getattr(config, "learn_scales", False):
            self.lora_scales[adapter_name] = nn.Parameter(self._linear.scales.float().clone())
        from_fractions = config.fractions is not False and not config.float_base
        self._starts[adapter_name] = (from_fractions, config.units == "step")
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    @property
    def _linear(self) -> QuantLinear:
        return cast(QuantLinear, self.get_base_layer())

    def _adapter(self, name: str) -> Adapter:
        a, b = factors(self, name)
        base = getattr(self._linear, FLOAT_BASE, None)
        from_fractions, in_steps = self._starts[name]
        fractions = self._linear.fractions if from_fractions else None
        new_scales = cast("Tensor | None", self.lora_scales.get(name, None))
        return Adapter(a, b, self.mask, scale_of(self, name), base, new_scales, fractions, in_steps)

    def _adapted(self, x: Tensor, adapter: str, dropout: float) -> Tensor:
        packed, bias = self._linear.packed(), self._linear.bias
        return linear(x, bias, packed, self._adapter(adapter), dropout, self.training)

    def effective_weight(self, adapter: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """[O, I]: the fake-quantized weight that training multiplies with."""
        return quant_aware_weight(self._linear.packed(), self._adapter(adapter), dtype)

    def merged_packed(self, adapter: str) -> Packed:
        """The adapted weight as integers on the grid, packed: they mean ``effective_weight``."""
        return merge_packed(self._linear.packed(), self._adapter(adapter))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging changes of the de-quantized weight, float32 [O, I]."""
        return self.effective_weight(adapter) - self._linear.dequantize()

    def _put_in(self, adapter: str, safe: bool) -> None:
        check_finite(adapter, safe, *factors(self, adapter))
        linear, packed = self._linear, self.merged_packed(adapter)
        self._before_merge.append((linear.packed(), linear.fractions))
        linear.qweight, linear.scales, linear.fractions = packed.qweight, packed.scales, None

    def _take_out(self, adapter: str) -> None:
        """Puts the base's integers back: rounding cannot be undone, so they were kept."""
        before, self._linear.fractions = self._before_merge.pop()
        self._linear.qweight, self._linear.scales = before.qweight, before.scales


class ScalesLinear(QuantAwareLoraLinear):
    """The grid's scales alone, as in EfficientQAT's second phase (arXiv 2407.11062): integers, and with them zeros, are
    the base's. Its factors, which PEFT wants, are frozen and cut to rank 0."""

    kind = SCALES

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        for factor in (*self.lora_A.values(), *self.lora_B.values()):
            factor.requires_grad_(False)

    def _adapter(self, name: str) -> Adapter:
        adapter = super()._adapter(name)
        return adapter._replace(a_RI=adapter.a_RI[:0], b_OR=adapter.b_OR[:, :0])


class QuantLoraLinear(ElasticLora):
    """Plain LoRA on a ``QuantLinear`` ("SQFT" in the paper: INT4 base, float adapter). It cannot be merged."""

    kind = SQFT

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UsageError("a float LoRA cannot be merged into an INT model: the sum is not on its grid. Train "
                         "quantization-aware adapters (--adapter qa-sparse-peft) to merge")  # fmt: skip
