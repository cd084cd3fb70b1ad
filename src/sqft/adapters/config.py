"""``SqftConfig``: a ``LoraConfig`` whose layers are masked by the base's sparsity, and on its grid if it is packed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from sqft.errors import UsageError

# What stands as ``peft_type`` in a saved adapter. PEFT looks the config class up by it; without sqft it stops with
# ``KeyError: <this text>`` instead of loading a dense LoRA, which would give wrong answers. So the text is the message.
PEFT_TYPE = "SQFT (a masked or elastic adapter that plain PEFT cannot apply: load this folder with sqft.load)"

_UNSUPPORTED = ("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora")
_OWN = ("sparse_adapter", "quantization_aware", "learn_scales", "float_base", "float_base_key", "search_space",
        "rank_groups")  # fmt: skip


@dataclass
class SqftConfig(LoraConfig):
    """LoRA's options plus those of SQFT (arXiv 2410.03750).

    Args:
        sparse_adapter: mask the adapter with the base's sparsity (SparsePEFT, section 3.3), so that it can be merged
            without filling a pruned weight. False is plain LoRA, or with ``quantization_aware`` a dense INT model's.
        quantization_aware: train through the packed base's own grid (QA-SparsePEFT, section 3.4), so that the adapter
            can be merged into the integers.
        learn_scales: with ``quantization_aware``, train the grid's scales too (LSQ); merging then stores them.
        float_base: with ``quantization_aware``, folder of the un-quantized sparse model to add the adapter to (as in
            the paper), instead of what the base's integers mean. ``float_base_key`` identifies its contents.
        search_space: ranks that a sub-adapter may have (NLS); none: the rank is fixed. ``r`` is the largest of them.
        rank_groups: which modules share a rank, and choices of their own: see ``elastic.make_groups``.

    ``target_modules`` left empty means the family's q, k, v, up and down projections when attached by ``sqft.attach``.
    """

    sparse_adapter: bool = field(default=True, metadata={"help": "mask the adapter with the base's sparsity"})
    quantization_aware: bool = field(default=False, metadata={"help": "train through the packed base's grid"})
    learn_scales: bool = field(default=False, metadata={"help": "train the grid's scales too"})
    float_base: str | None = field(default=None, metadata={"help": "folder of the un-quantized sparse base"})
    float_base_key: str = field(default="", metadata={"help": "key of the float base's contents"})

    search_space: list[int] | None = field(default=None, metadata={"help": "ranks that a sub-adapter may have"})
    rank_groups: list[str] | None = field(default=None, metadata={"help": "which modules share a rank"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_groups and not self.search_space:
            raise UsageError("rank_groups go with a search_space, e.g. [32, 24, 16]")
        if self.search_space and min(self.search_space) < 1:
            raise UsageError(f"search_space is {self.search_space}: ranks are greater than 0")
        for name in ("learn_scales", "float_base"):
            if getattr(self, name) and not self.quantization_aware:
                raise UsageError(f"{name} goes with quantization_aware=True only")
        if not self.is_sqft:
            return
        for name in _UNSUPPORTED:
            if getattr(self, name, False):
                raise UsageError(f"{name} does not go with masked or elastic adapters: leave it out")
        from sqft.adapters.peft_bridge import register

        register(self)

    @property
    def is_sqft(self) -> bool:
        """Whether the adapters are ours; otherwise they are plain LoRA."""
        return self.sparse_adapter or self.quantization_aware or bool(self.search_space)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if self.is_sqft:
            values["peft_type"] = PEFT_TYPE
        else:  # then it is a plain LoRA and any PEFT may load it
            for name in _OWN:
                del values[name]
        return values
