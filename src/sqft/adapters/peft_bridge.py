"""All that sqft has to know of PEFT's inside: attach our layers, save and load adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from torch import nn

from sqft import artifact
from sqft.adapters.config import PEFT_TYPE, SqftConfig
from sqft.adapters.lora import ElasticLora
from sqft.adapters.quant_aware import FLOAT_BASE, QuantAwareLoraLinear, QuantLoraLinear
from sqft.adapters.sparse import MaskedLoraLinear, SparseLoraLinear
from sqft.elastic.groups import make_groups
from sqft.errors import SqftError, UsageError
from sqft.models.dense import load_dense
from sqft.models.discover import describe, resolve_targets
from sqft.models.weights import is_linear
from sqft.quantization.linear import QuantLinear
from sqft.sparsity.masks import ensure_masks, packed_mask, set_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"


def register(config: LoraConfig) -> None:
    """Lets PEFT build our layers for this config, and find a saved one's config class (in Trainer's resume, say)."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SqftConfig  # pyright: ignore[reportArgumentType]
    if getattr(config, "quantization_aware", False):
        layers: dict[Any, Any] = {nn.Linear: QuantAwareLoraLinear, QuantLinear: QuantAwareLoraLinear}
    elif getattr(config, "sparse_adapter", False):
        layers = {nn.Linear: SparseLoraLinear, QuantLinear: SparseLoraLinear}
    else:
        layers = {QuantLinear: QuantLoraLinear}
        if getattr(config, "search_space", None):
            layers[nn.Linear] = ElasticLora
    config._register_custom_module(layers)  # a layer that does not go with its base says so


def attach(model: PreTrainedModel, config: LoraConfig | None = None) -> PeftModel:
    """Attaches fresh adapters: masked ones for a ``SqftConfig``, plain LoRA for PEFT's ``LoraConfig``.

    Target modules are looked up in the model's family; an empty list means the family's q, k, v, up and down.
    Raises UsageError for a target that matches no module, SqftError if masked adapters are asked for on a model that
    is not sparse, or adapters that do not go with a float or a packed base.
    """
    config = config or SqftConfig()
    architecture = describe(model)
    targets = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules or [])
    names = resolve_targets(architecture, sorted(targets))
    config.target_modules = set(names)  # pyright: ignore[reportAttributeAccessIssue]
    config.task_type = config.task_type or "CAUSAL_LM"
    if isinstance(config, SqftConfig) and config.search_space:
        groups = make_groups(names, config.rank_groups or (), config.search_space)
        config.r = max(group.choices[0] for group in groups)
    _prepare_bases(model, {name: model.get_submodule(name) for name in names}, config)
    return get_peft_model(model, config)  # pyright: ignore[reportReturnType]


def _prepare_bases(model: nn.Module, modules: Mapping[str, Any], config: LoraConfig) -> None:
    """What the base layers need before adapters of this config go on them; errors if they do not go together."""
    register(config)
    ensure_masks(model)
    if getattr(config, "sparse_adapter", False):
        _check_sparse(modules)
    elif isinstance(config, SqftConfig) and config.quantization_aware:
        for module in modules.values():  # a dense INT model: every weight may change
            if packed_mask(module) is None:
                set_mask(module, torch.ones(module.out_features, module.in_features, dtype=torch.bool))
    if isinstance(config, SqftConfig) and config.float_base:
        _set_float_bases(modules, config)


def _check_sparse(modules: Mapping[str, Any]) -> None:
    """Raises SqftError if the base layers are dense: a masked adapter on them would be an unmasked one."""
    if modules and all(packed_mask(module) is None for module in modules.values()):
        raise SqftError(
            "this model is not sparse (no target module has a mask): sparsify it first (and save it, if adapters on it "
            "are to be loaded again), load a packed model that another tool pruned with mask='zeros' (--mask zeros), "
            "or use plain LoRA (--adapter lora, or sparse_adapter=False)"
        )


def _set_float_bases(modules: Mapping[str, Any], config: SqftConfig) -> None:
    """Puts the un-quantized weights beside the packed ones. Raises SqftError if they are another model's."""
    source = str(config.float_base)
    key = artifact.folder_key(source)
    if config.float_base_key and config.float_base_key != key:
        raise SqftError(f"{source} is not the float base that the adapter was trained on: it has changed since")
    config.float_base_key = key
    other = dict(load_dense(source).named_modules())
    for name, module in modules.items():
        linear: Any = other.get(name)
        if not isinstance(linear, nn.Linear) or (linear.out_features, linear.in_features) != (
            module.out_features, module.in_features
        ):  # fmt: skip
            raise SqftError(f"float base {source} has no {name} like the packed model's: it is another model")
        module.register_buffer(FLOAT_BASE, linear.weight.detach(), persistent=False)


def load_adapter(model: PreTrainedModel, folder: str | Path, trainable: bool = False) -> PeftModel:
    """Loads an adapter folder, ours or PEFT's LoRA, onto its base. Raises SqftError if it does not fit."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SqftConfig  # pyright: ignore[reportArgumentType]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT only warns when weights are missing
            config: Any = PeftConfig.from_pretrained(str(folder))
            modules = _targeted(model, config.target_modules or ())
            config.inference_mode = not trainable
            _prepare_bases(model, modules, config)
            loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)
    except SqftError:
        raise
    except Exception as error:  # PEFT raises many kinds; each means adapter and model do not fit, or a corrupt file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SqftError(f"adapter {folder} does not fit its base model, or is corrupt: {reason}") from error
    if getattr(config, "float_base", None):
        for path, layer in adapter_layers(loaded).items():
            if getattr(layer.get_base_layer(), FLOAT_BASE, None) is None:
                raise SqftError(f"adapter {folder} adapts {path}, for which its float base was not found")
    return loaded


def _targeted(model: nn.Module, targets: Any) -> dict[str, Any]:
    """The linear modules that a saved config names: PEFT shortens twenty and more full names to their endings."""
    names = [targets] if isinstance(targets, str) else list(targets)
    return {
        path: module
        for path, module in model.named_modules()
        if is_linear(module) and any(path == name or path.endswith(f".{name}") for name in names)
    }


def adapter_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by the base model's module names."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def is_masked(model: nn.Module) -> bool:
    """Whether every adapter layer is masked, i.e. whether merging keeps the zeros."""
    layers = adapter_layers(model)
    return bool(layers) and all(isinstance(layer, MaskedLoraLinear) for layer in layers.values())


def is_quant_aware(model: nn.Module) -> bool:
    """Whether the adapters are on a packed base and merge into its integers."""
    layers = adapter_layers(model)
    return bool(layers) and all(isinstance(layer, QuantAwareLoraLinear) for layer in layers.values())


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
