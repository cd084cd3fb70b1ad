"""``SqftConfig``: a ``LoraConfig`` whose layers are masked by the base's sparsity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from sqft.errors import UsageError

# What stands as ``peft_type`` in a saved adapter. PEFT looks the config class up by it; without sqft it stops with
# ``KeyError: <this text>`` instead of loading a dense LoRA, which would give wrong answers. So the text is the message.
PEFT_TYPE = "SQFT (a masked adapter that plain PEFT cannot apply: load this folder with sqft.load)"

_UNSUPPORTED = ("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora")


@dataclass
class SqftConfig(LoraConfig):
    """LoRA's options plus those of SQFT (arXiv 2410.03750).

    Args:
        sparse_adapter: mask the adapter with the base's sparsity (SparsePEFT, section 3.3), so that it can be merged
            without filling a pruned weight. False is plain LoRA.

    ``target_modules`` left empty means the family's q, k, v, up and down projections when attached by ``sqft.attach``.
    """

    sparse_adapter: bool = field(default=True, metadata={"help": "mask the adapter with the base's sparsity"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sparse_adapter:
            return
        for name in _UNSUPPORTED:
            if getattr(self, name, False):
                raise UsageError(f"{name} does not go with masked adapters: leave it out, or set sparse_adapter=False")
        from sqft.adapters.peft_bridge import register

        register(self)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if self.sparse_adapter:
            values["peft_type"] = PEFT_TYPE
        else:  # then it is a plain LoRA and any PEFT may load it
            del values["sparse_adapter"]
        return values
