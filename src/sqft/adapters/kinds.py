"""The kinds of adapter, as data: which base they go on, whether they are masked, whether they merge into one model.

A package adds one by an entry point in ``sqft.adapter_kinds`` that names a ``Kind``. Its layer derives from
``MaskedLoraLinear`` (or from PEFT's ``Linear``, with ``check_adapter`` called in ``resolve_lora_variant``).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sqft.registry import KINDS


@dataclass(frozen=True)
class Kind:
    """``packed``: for an INT base, else for a float one. ``layer``: "module:class" of the adapter's layers.
    ``whole``: no layers are added, the base's own weights are trained: what training makes is a model, with nothing to
    merge. ``learning_rate``: what training takes if it is told none. ``scales_only``: nothing but the grid's scales is
    trained, at that rate."""

    name: str
    help: str
    layer: str = ""
    packed: bool = False
    masked: bool = False
    quantization_aware: bool = False
    merges: bool = False
    whole: bool = False
    learning_rate: float = 3e-4  # the paper's
    scales_only: bool = False

    @property
    def makes(self) -> str:
        """What the train stage writes."""
        return "model" if self.whole else "adapter"

    @property
    def one_model(self) -> bool:
        """Whether base and what was learnt end as one model."""
        return self.merges or self.whole

    def layer_class(self) -> Any:
        module, _, name = self.layer.partition(":")
        return getattr(import_module(module), name)


SPARSE_PEFT = Kind("sparse-peft", "masked by the base's sparsity (SparsePEFT)", "sqft.adapters.sparse:SparseLoraLinear",
                   masked=True, merges=True)  # fmt: skip
QA_SPARSE_PEFT = Kind("qa-sparse-peft", "masked, and rounded on the base's own grid (QA-SparsePEFT)",
                      "sqft.adapters.quant_aware:QuantAwareLoraLinear", packed=True, masked=True,
                      quantization_aware=True, merges=True, learning_rate=1e-3)  # fmt: skip
SCALES = Kind("scales", "the grid's scales alone; integers stay", "sqft.adapters.quant_aware:ScalesLinear", packed=True,
              masked=True, quantization_aware=True, merges=True, learning_rate=1e-5, scales_only=True)  # fmt: skip
LORA = Kind("lora", "plain LoRA", "sqft.adapters.lora:ElasticLora")
SQFT = Kind("sqft", "plain LoRA beside an INT base (SQFT)", "sqft.adapters.quant_aware:QuantLoraLinear", packed=True)
SPARSE_FULL = Kind("sparse-full", "the kept weights and the norms themselves (masked full fine-tuning)", masked=True,
                   whole=True, learning_rate=5e-5)  # fmt: skip
PLAIN = (LORA, SQFT)


def kind_of(config: Any, packed: bool) -> Kind:
    """The kind that a ``LoraConfig`` asks for on a packed or float weight: by name, else by its flags."""
    if getattr(config, "kind", ""):
        return KINDS[config.kind]
    if getattr(config, "quantization_aware", False):
        return QA_SPARSE_PEFT
    if getattr(config, "sparse_adapter", False):
        return SPARSE_PEFT
    return SQFT if packed else LORA


def layer_kind(layer: Any) -> Kind:
    """The kind of an adapted layer; PEFT's own layers are plain LoRA."""
    return getattr(layer, "kind", LORA)
