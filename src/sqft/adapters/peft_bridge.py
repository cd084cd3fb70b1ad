"""All that sqft has to know of PEFT's inside: attach our layers, save and load adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from torch import nn

from sqft.adapters.config import PEFT_TYPE, SqftConfig
from sqft.adapters.sparse import SparseLoraLinear
from sqft.errors import SqftError, UsageError
from sqft.models.discover import describe, resolve_targets
from sqft.sparsity.masks import count_zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
_SPARSE_FROM = 0.01  # a dense model has almost no zeros (a de-quantized one 0.03 %)


def register(config: SqftConfig) -> None:
    """Lets PEFT build our layer for this config, and find a saved one's config class (in Trainer's resume, say)."""
    config._register_custom_module({nn.Linear: SparseLoraLinear})
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SqftConfig  # pyright: ignore[reportArgumentType]


def attach(model: PreTrainedModel, config: LoraConfig | None = None) -> PeftModel:
    """Attaches fresh adapters: masked ones for a ``SqftConfig``, plain LoRA for PEFT's ``LoraConfig``.

    Target modules are looked up in the model's family; an empty list means the family's q, k, v, up and down.
    Raises UsageError for a target that matches no module, SqftError if masked adapters are asked for on a model that
    is not sparse.
    """
    config = config or SqftConfig()
    architecture = describe(model)
    targets = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules or [])
    names = resolve_targets(architecture, sorted(targets))
    config.target_modules = set(names)  # pyright: ignore[reportAttributeAccessIssue]
    config.task_type = config.task_type or "CAUSAL_LM"
    if getattr(config, "sparse_adapter", False):
        _check_sparse({name: model.get_submodule(name) for name in names})
    return get_peft_model(model, config)  # pyright: ignore[reportReturnType]


def _check_sparse(modules: Mapping[str, Any]) -> None:
    """Raises SqftError if the base layers are dense: a masked adapter on them would be an unmasked one."""
    zeros = sum(count_zeros(module.weight) for module in modules.values())
    share = zeros / sum(module.weight.numel() for module in modules.values())
    if share < _SPARSE_FROM:
        raise SqftError(
            f"this model is not sparse ({share:.2%} zeros in the target modules): sparsify it first (and save it, if "
            "adapters on it are to be loaded again), or use plain LoRA (--pipeline lora, or sparse_adapter=False)"
        )


def load_adapter(model: PreTrainedModel, folder: str | Path, trainable: bool = False) -> PeftModel:
    """Loads an adapter folder, ours or PEFT's LoRA, onto its base. Raises SqftError if it does not fit."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SqftConfig  # pyright: ignore[reportArgumentType]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT only warns when weights are missing
            loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except SqftError:
        raise
    except Exception as error:  # PEFT raises many kinds; each means adapter and model do not fit, or a corrupt file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SqftError(f"adapter {folder} does not fit its base model, or is corrupt: {reason}") from error
    if is_masked(loaded):
        _check_sparse({name: layer.get_base_layer() for name, layer in adapter_layers(loaded).items()})
    return loaded


def adapter_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by the base model's module names."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def is_masked(model: nn.Module) -> bool:
    """Whether every adapter layer is masked, i.e. whether merging keeps the zeros."""
    layers = adapter_layers(model)
    return bool(layers) and all(isinstance(layer, SparseLoraLinear) for layer in layers.values())


def merged_weight(layer: Any, adapter: str) -> Any:
    """The merged weight [O, I] of one adapted layer, in the base's dtype; dense for plain LoRA."""
    if isinstance(layer, SparseLoraLinear):
        return layer.merged_weight(adapter)
    weight = layer.get_base_layer().weight
    return (weight.float() + layer.get_delta_weight(adapter).float()).to(weight.dtype)


def active_adapter(model: PeftModel) -> str:
    """The one active adapter's name. Raises UsageError if there are several."""
    names = model.active_adapters
    if len(names) != 1:
        raise UsageError(f"{len(names)} adapters are active ({', '.join(names)}): set_adapter one of them")
    return names[0]
