"""``SqftConfig``: a ``LoraConfig`` whose layers are masked by the base's sparsity, and on its grid if it is packed."""

from __future__ import annotations

import copy
import os
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from sqft.adapters.experts import leave_experts_apart
from sqft.adapters.kinds import LORA, PLAIN, kind_of
from sqft.errors import SqftError, UsageError
from sqft.models.weights import is_plain, is_transposed
from sqft.quantization.linear import QuantLinear
from sqft.registry import KINDS

# What stands as ``peft_type`` in a saved adapter. PEFT looks the config class up by it; without sqft it stops with
# ``KeyError: <this text>`` instead of loading a dense LoRA, which would give wrong answers. So the text is the message.
PEFT_TYPE = "SQFT (a masked or elastic adapter that plain PEFT cannot apply: load this folder with sqft.load)"
# Options of ``LoraConfig`` that go with sqft's layers. Those that are not listed are refused by name.
_ALLOWED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices",
    "ensure_weight_tying",
}  # fmt: skip
_INITIALISATIONS = (True, False, "gaussian")
_REWRITE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_WHY = {
    "use_dora": "its magnitudes scale the whole weight, not the masked product",
    "lora_bias": "the bias of B is outside the masked product",
    "alora_invocation_tokens": "it acts on some tokens only, so there is no weight to merge",
    "arrow_config": "it routes each token to other adapters, so there is no weight to merge",
    "use_qalora": "use quantization_aware=True",
}


def _option(default: Any, text: str, refused_by_peft: bool = False) -> Any:
    """A field; PEFT's own layers refuse an adapter with a "variant" that they do not know, instead of ignoring it."""
    return field(default=default, metadata={"help": text, "is_lora_variant": refused_by_peft})


@dataclass
class SqftConfig(LoraConfig):
    """LoRA's options plus those of SQFT (arXiv 2410.03750). Those of LoRA that would be ignored are refused by name.

    Args:
        kind: name of an adapter kind (``registry.KINDS``); it decides the two flags that follow. Empty: they decide.
        sparse_adapter: mask the adapter with the base's sparsity (SparsePEFT, section 3.3), so that it can be merged
            without filling a pruned weight. False is plain LoRA, or with ``quantization_aware`` a dense INT model's.
        quantization_aware: train through the packed base's own grid (QA-SparsePEFT, section 3.4), so that the adapter
            can be merged into the integers.
        learn_scales: with ``quantization_aware``, train the grid's scales too (LSQ); merging then stores them.
        float_base: with ``quantization_aware``, folder of the un-quantized sparse model to add the adapter to (as in
            the paper), instead of what the base's integers mean. It is saved relative to the adapter's folder.
            ``float_base_key`` identifies its contents.
        units: with ``quantization_aware``, what A and B count in: 'weight' (the paper), or 'step', steps of the grid.
        fractions: with ``quantization_aware``, start from what rounding took away (``QuantLinear.fractions``), or not;
            None: if the base has it. It is saved as True or False.
        search_space: ranks that a sub-adapter may have (NLS); none: the rank is fixed. ``r`` is the largest of them.
        rank_groups: which modules share a rank, and choices of their own: see ``make_groups``.
        rank_scaling: the scale of a sub-adapter of rank r: 'largest', alpha / R as of the full rank R, or its 'own',
            alpha / r. With ``use_rslora`` the root of the rank.
        train_norms: train the model's norms too: ``sqft.attach`` adds their names to ``modules_to_save``.

    ``target_modules`` left empty means the family's q, k, v, up and down projections when attached by ``sqft.attach``,
    'all' (or 'all-linear') all linear weights of the blocks.
    """

    kind: str = _option("", "name of an adapter kind", True)
    sparse_adapter: bool = _option(True, "mask the adapter with the base's sparsity", True)
    quantization_aware: bool = _option(False, "train through the packed base's grid", True)
    learn_scales: bool = _option(False, "train the grid's scales too")
    float_base: str | None = _option(None, "folder of the un-quantized sparse base")
    float_base_key: str = _option("", "key of the float base's contents")
    units: str = _option("weight", "what the factors count in: weight or step")
    fractions: bool | None = _option(None, "start from what rounding took away")
    search_space: list[int] | None = _option(None, "ranks that a sub-adapter may have", True)
    rank_groups: list[str] | None = _option(None, "which modules share a rank")
    rank_scaling: str = _option("largest", "by which rank a sub-adapter is scaled: largest or own")
    train_norms: bool = _option(False, "train the model's norms too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind:
            kind = KINDS[self.kind]
            if kind.whole:
                raise UsageError(f"{self.kind} has no adapters to attach: sqft.train(model, TrainConfig(adapter="
                                 f"'{self.kind}'), tokenizer=...) trains the model itself")  # fmt: skip
            self.sparse_adapter, self.quantization_aware = kind.masked and self.sparse_adapter, kind.quantization_aware
            self.kind = "" if kind in PLAIN else self.kind  # which of the two the base decides
            if kind.scales_only:
                self.learn_scales, self.units, self.fractions = True, "step", False
                self.sparse_adapter, self.r = False, 1  # the base need not be sparse; the factors are not used
                if self.search_space or self.float_base:
                    raise UsageError(f"{self.kind} trains no factors: leave search_space and float_base out")
        if self.rank_groups and not self.search_space:
            raise UsageError("rank_groups go with a search_space, e.g. [32, 24, 16]")
        if self.rank_scaling not in ("largest", "own"):
            raise UsageError(f"rank_scaling is '{self.rank_scaling}': choose largest or own")
        if self.rank_scaling != "largest" and not self.search_space:
            raise UsageError("rank_scaling goes with a search_space, e.g. [32, 24, 16]")
        if self.search_space and min(self.search_space) < 1:
            raise UsageError(f"search_space is {self.search_space}: ranks are greater than 0")
        if self.search_space and self.rank_pattern:
            raise UsageError("rank_pattern does not go with a search_space: give groups their own ranks (rank_groups)")
        if self.units not in ("weight", "step"):
            raise UsageError(f"units is '{self.units}': choose weight or step")
        for name, given in (("learn_scales", self.learn_scales), ("float_base", self.float_base),
                            ("units", self.units != "weight"), ("fractions", self.fractions)):  # fmt: skip
            if given and not self.quantization_aware:
                raise UsageError(f"{name} goes with quantization_aware=True only")
        if self.is_sqft:
            check_options(self)
        register(self)

    @property
    def is_sqft(self) -> bool:
        """Whether the adapters are ours; otherwise they are plain LoRA."""
        return bool(self.kind or self.sparse_adapter or self.quantization_aware or self.search_space)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if self.is_sqft:
            values["peft_type"] = PEFT_TYPE
        else:  # then it is a plain LoRA and any PEFT may load it
            for name in {option.name for option in fields(self)} - {option.name for option in fields(LoraConfig)}:
                del values[name]
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, with ``float_base`` relative to the folder, so that a run can be moved."""
        saved = copy.copy(self)
        if self.float_base and Path(self.float_base).is_dir():
            saved.float_base = Path(os.path.relpath(self.float_base, save_directory)).as_posix()
        super(SqftConfig, saved).save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """As PEFT's, with ``float_base`` as a path from here."""
        values = super().from_json_file(path_json_file, **kwargs)
        if values.get("float_base"):
            base = Path(path_json_file).parent / values["float_base"]
            values["float_base"] = os.path.abspath(base) if base.is_dir() else values["float_base"]
        return values


def check_options(config: LoraConfig) -> None:
    """Raises UsageError for an option that sqft's layers would ignore or that would change the base."""
    check_initialisation(config)
    if config.init_lora_weights not in _INITIALISATIONS:
        raise UsageError(f"init_lora_weights='{config.init_lora_weights}' is not made for masked, INT or elastic "
                         "adapters: use True, False or 'gaussian'")  # fmt: skip
    for option in fields(LoraConfig):
        value: Any = getattr(config, option.name)
        if option.name in _ALLOWED or option.name == "init_lora_weights" or value == _default(option):
            continue
        why = _WHY.get(option.name, "their layers do not know it")
        raise UsageError(f"{option.name} does not go with masked, INT or elastic adapters ({why}): leave it out")


def check_initialisation(config: LoraConfig) -> None:
    """Raises UsageError for an option by which PEFT changes the base's weights when the adapter is made."""
    name = str(config.init_lora_weights).lower()
    if name.startswith(_REWRITE) or config.kasa_config is not None:
        option = "kasa_config" if config.kasa_config is not None else f"init_lora_weights='{name}'"
        raise UsageError(f"{option} rewrites the base's weights, which fills the zeros of a sparse model and leaves "
                         "the grid of an INT one: use True, False or 'gaussian'")  # fmt: skip


def _default(option: Any) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def register(config: LoraConfig) -> None:
    """Lets PEFT build our layers for this config, and find a saved one's config class (in Trainer's resume, say)."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SqftConfig  # pyright: ignore[reportArgumentType]
    leave_experts_apart()
    config._register_custom_module({nn.Module: _make_layer})  # pyright: ignore[reportArgumentType]


def _make_layer(base: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
    """The layer of the config's kind on a base layer; None for plain LoRA on a float one, which is PEFT's own. Raises
    SqftError if the kind is for other bases."""
    packed = isinstance(base, QuantLinear)
    kind = kind_of(config, packed)
    if kind == LORA and not packed and not getattr(config, "search_space", None):
        return None
    if packed != kind.packed or not (packed or is_plain(base)):
        what, wanted = kwargs.get("target_name") or "a target", "INT weights" if kind.packed else "torch.nn.Linear"
        hint = "quantize the model first (sqft quantize)" if kind.packed else "leave it out"
        if packed:
            hint += f", or use another kind ({', '.join(name for name in KINDS if KINDS[name].packed)})"
        raise SqftError(f"{what} is a {type(base).__name__} and adapters of kind {kind.name} are for {wanted}: {hint}")
    return kind.layer_class()(base, adapter_name, config=config, **kwargs | {"fan_in_fan_out": is_transposed(base)})
