"""The kinds of adapter, as data: which base they go on, whether they are masked, whether they merge into one model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """``packed``: for an INT base, else for a float one. ``layer``: "module:class" of the adapter's layers."""

    name: str
    help: str
    layer: str
    packed: bool = False
    masked: bool = False
    quantization_aware: bool = False
    merges: bool = False


SPARSE_PEFT = Kind("sparse-peft", "masked by the base's sparsity (SparsePEFT)", "sqft.adapters.sparse:SparseLoraLinear",
                   masked=True, merges=True)  # fmt: skip
QA_SPARSE_PEFT = Kind("qa-sparse-peft", "masked, and rounded on the base's own grid (QA-SparsePEFT)",
                      "sqft.adapters.quant_aware:QuantAwareLoraLinear", packed=True, masked=True,
                      quantization_aware=True, merges=True)  # fmt: skip
LORA = Kind("lora", "plain LoRA", "sqft.adapters.lora:ElasticLora")
SQFT = Kind("sqft", "plain LoRA beside an INT base (SQFT)", "sqft.adapters.quant_aware:QuantLoraLinear", packed=True)
