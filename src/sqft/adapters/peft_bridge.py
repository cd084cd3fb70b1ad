"""All that sqft has to know of PEFT's inside: attach our layers, save and load adapters."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from sqft import artifact
from sqft.adapters.config import PEFT_TYPE, SqftConfig, check_initialisation, register
from sqft.adapters.groups import make_groups
from sqft.adapters.kinds import layer_kind
from sqft.adapters.norms import train_rounded
from sqft.adapters.quant_aware import FLOAT_BASE
from sqft.adapters.sparse import give_mask
from sqft.errors import SqftError, UsageError, first_line
from sqft.models.bounds import check_adapter
from sqft.models.dense import load_dense
from sqft.models.discover import Architecture, describe, norms, resolve_targets
from sqft.models.types import PreTrainedModel
from sqft.models.weights import Weight, is_linear, is_plain
from sqft.registry import KINDS
from sqft.sparsity.masks import ensure_masks, packed_mask


def attach(model: PreTrainedModel, config: LoraConfig | None = None) -> PeftModel:
    """Attaches fresh adapters: those of a ``SqftConfig``, plain LoRA for PEFT's ``LoraConfig``. It keeps the config.

    Target modules are looked up in the model's family; an empty list means the family's q, k, v, up and down,
    'all' (or 'all-linear') all weights of its blocks. Raises UsageError for a target that matches no module and an
    option that does not go with the base, SqftError if masked adapters are asked for on a model that is not sparse, or
    adapters that do not go with a float or a packed base.
    """
    config = copy.deepcopy(config) if config is not None else SqftConfig()
    names = _target_names(describe(model), config)
    config.target_modules = set(names)  # pyright: ignore[reportAttributeAccessIssue]
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None  # the names say it
    config.task_type = config.task_type or "CAUSAL_LM"
    if isinstance(config, SqftConfig) and config.search_space:
        groups = make_groups(names, config.rank_groups or (), config.search_space)
        config.r = max(group.choices[0] for group in groups)
    if getattr(config, "train_norms", False):
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *norms(model)]))
    _prepare_bases(model, {name: model.get_submodule(name) for name in names}, config)
    adapted: Any = get_peft_model(model, config)
    train_rounded(adapted)
    return adapted


def _target_names(architecture: Architecture, config: LoraConfig) -> list[str]:
    """Full names of the modules that a fresh config adapts, in execution order. Raises UsageError if there is none."""
    wanted = config.target_modules or ()
    if not wanted and getattr(config, "kind", "") and KINDS[config.kind].scales_only:  # pyright: ignore
        wanted = [weight.name for weight in architecture.weights() if weight.packed]
    if isinstance(wanted, str) and set(wanted) & set("\\()|^$+.{"):
        raise UsageError(f"target_modules is the regular expression '{wanted}': name the modules in a list, with shell "
                         "patterns if need be (['q_proj', '*.3.mlp.*']), or write 'all'")  # fmt: skip
    names = resolve_targets(architecture, [wanted] if isinstance(wanted, str) else sorted(wanted))
    for saved in config.modules_to_save or ():
        if inside := next((name for name in architecture.names() if f".{saved}." in f".{name}."), None):
            raise UsageError(f"modules_to_save '{saved}' would train all of {inside}, zeros and all: adapt that module "
                             "(target_modules), and save whole only what has no linear weights of a block")  # fmt: skip
    leaves = copy.copy(config)  # PEFT looks at layers_to_transform for names that are not full only
    leaves.target_modules = {name.rsplit(".", 1)[-1] for name in names}  # pyright: ignore[reportAttributeAccessIssue]
    kept = [name for name in names if check_target_module_exists(leaves, name)]
    if not kept:
        raise UsageError("no target module is left: layers_to_transform, layers_pattern and exclude_modules leave out "
                         f"all {len(names)} (full names look like {names[0]})")  # fmt: skip
    return kept


def _prepare_bases(model: nn.Module, modules: Mapping[str, Any], config: LoraConfig) -> None:
    """What the base layers need before adapters of this config go on them; errors if they do not go together."""
    register(config)
    ensure_masks(model)
    sparse = not modules or any(packed_mask(module) is not None for module in modules.values())
    if sparse:
        check_initialisation(config)
    if getattr(config, "sparse_adapter", False):
        if not sparse:
            raise SqftError("this model is not sparse: no target module has a mask. Sparsify it first (and save it, if "
                            "adapters on it are to be loaded again), load an INT one that another tool pruned with "
                            "mask='zeros', or use plain LoRA (--adapter lora, sparse_adapter=False)")  # fmt: skip
        for module in modules.values():
            give_mask(module, sparse=False)  # in a sparse model, a layer that is dense may change everywhere
    source = getattr(config, "float_base", None)
    for module in modules.values():  # of an earlier adapter
        if getattr(module, FLOAT_BASE, None) is not None and not source:
            delattr(module, FLOAT_BASE)
    if isinstance(config, SqftConfig) and source:
        _set_float_bases(modules, config)
    elif isinstance(config, SqftConfig) and config.quantization_aware:
        there = any(getattr(module, "fractions", None) is not None for module in modules.values())
        if config.fractions and not there:
            raise SqftError("the adapter starts from the fractions of its base, which has none: quantize it with "
                            "--keep-fractions, or leave fractions out")  # fmt: skip
        config.fractions = there if config.fractions is None else config.fractions


def _set_float_bases(modules: Mapping[str, Any], config: SqftConfig) -> None:
    """Puts the un-quantized weights beside the packed ones. Raises SqftError if they are another model's."""
    source = str(config.float_base)
    if source.startswith(".") and not Path(source).exists():
        raise SqftError(f"the float base of the adapter is gone: its config names {source}")
    artifact.check_input(source)
    key = artifact.folder_key(source)
    if config.float_base_key and config.float_base_key != key:
        raise SqftError(f"{source} is not the float base that the adapter was trained on: it has changed since")
    config.float_base_key = key
    other = dict(load_dense(source).named_modules())
    for name, module in modules.items():
        weight = Weight(name, other[name]) if name in other and is_plain(other[name]) else None
        if weight is None or weight.shape != (module.out_features, module.in_features):
            raise SqftError(f"float base {source} has no {name} like the packed model's: it is another model")
        module.register_buffer(FLOAT_BASE, weight.read(), persistent=False)


def load_adapter(model: PreTrainedModel, folder: str | Path, trainable: bool = False) -> PeftModel:
    """Loads an adapter folder, ours or PEFT's LoRA, onto its base. Raises SqftError if it does not fit."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SqftConfig  # pyright: ignore[reportArgumentType]
    check_adapter(folder)
    try:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftConfig._get_peft_type(str(folder))]
        config: Any = kind.from_pretrained(str(folder))
        config.inference_mode = not trainable
        if isinstance(config, LoraConfig):
            _prepare_bases(model, _targeted(model, config), config)
        loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)
        # It only warns of weights that are missing, and says nothing of those that are too many.
        found = set_peft_model_state_dict(loaded, load_peft_weights(str(folder), device="cpu"))
    except (SqftError, UsageError):
        raise
    except Exception as error:  # PEFT raises many kinds; each means adapter and model do not fit, or a corrupt file
        raise SqftError(f"adapter {folder} does not fit its base model, or is corrupt: {first_line(error)}") from error
    parts = (".lora_", ".modules_to_save.")
    missing = [key for key in found.missing_keys if ".default" in key and any(part in key for part in parts)]
    for what, keys in (("lacks", missing), ("has beside its base", found.unexpected_keys)):
        if keys:
            raise SqftError(f"adapter {folder} does not fit its base model, or is corrupt: it {what} {keys[0]} and "
                            f"{len(keys) - 1} more weights")  # fmt: skip
    if trainable:
        train_rounded(loaded)
    return loaded


def in_order(folder: Path) -> None:
    """Sorts the names in a saved adapter's config, which PEFT holds in sets: two runs write the same bytes."""
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    ordered = {key: sorted(value) if key in ("target_modules", "exclude_modules") and isinstance(value, list) else value
               for key, value in values.items()}  # fmt: skip
    file.write_text(json.dumps(ordered, indent=2, sort_keys=True), encoding="utf-8")


def start_from(model: PeftModel, folder: str | Path) -> None:
    """Gives a model's fresh adapter another's weights: A and B, and whatever else that trained. Raises UsageError if
    they differ in modules, rank or scaling, saying in what; SqftError for a corrupt file."""
    name = active_adapter(model)
    artifact.check_input(folder)
    if not (Path(folder) / "adapter_config.json").is_file():
        raise UsageError(f"{folder} is not an adapter folder: give one that 'sqft train' wrote to start from")
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SqftConfig  # pyright: ignore[reportArgumentType]
    check_adapter(folder)
    try:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftConfig._get_peft_type(str(folder))]
        theirs, state = kind.from_pretrained(str(folder)), load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # PEFT and safetensors raise many kinds
        raise SqftError(f"adapter {folder} cannot be read: {first_line(error)}") from error
    mine = model.peft_config[name]
    for option in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "units"):
        other, own = (getattr(config, option, "weight") for config in (theirs, mine))
        if other != own:
            raise UsageError(f"{folder} has {option} {other} and this adapter {own}: they have to be equal to start "
                             "from it")  # fmt: skip
    fresh = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    for what, keys in (("trains", state.keys() - fresh.keys()),
                       ("lacks", {key for key in fresh if ".lora_scales" not in key} - state.keys())):  # fmt: skip
        if keys:
            raise UsageError(f"{folder} {what} {min(keys).removeprefix('base_model.model.')} and {len(keys) - 1} more, "
                             "unlike this adapter: give both the same target_modules and options")  # fmt: skip
    for key, tensor in state.items():
        if tensor.shape != fresh[key].shape:
            raise UsageError(f"{folder} has {key} of shape {list(tensor.shape)} and this adapter "
                             f"{list(fresh[key].shape)}: it is of another model")  # fmt: skip
    set_peft_model_state_dict(model, state, adapter_name=name)


def _targeted(model: nn.Module, config: Any) -> dict[str, Any]:
    """The linear modules that a saved config names: PEFT shortens twenty and more full names to their endings."""
    if not config.target_modules:
        return {}
    return {path: module for path, module in model.named_modules()
            if is_linear(module) and check_target_module_exists(config, path)}  # fmt: skip


def adapter_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by the base model's module names."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def is_masked(model: nn.Module) -> bool:
    """Whether every adapter layer is masked, i.e. whether merging keeps the zeros."""
    layers = adapter_layers(model)
    return bool(layers) and all(layer_kind(layer).masked for layer in layers.values())


def merged_weight(layer: Any, adapter: str) -> Any:
    """The merged weight of one adapted layer on a float base, in the base's dtype and as its parameter lies; dense for
    plain LoRA."""
    if layer_kind(layer).masked:
        return layer.as_stored(layer.merged_weight(adapter))
    weight = layer.get_base_layer().weight
    return (weight.float() + layer.get_delta_weight(adapter).float()).to(weight.dtype)


def active_adapter(model: PeftModel) -> str:
    """The one active adapter's name. Raises UsageError if there are several."""
    names = model.active_adapters
    if len(names) != 1:
        raise UsageError(f"{len(names)} adapters are active ({', '.join(names)}): set_adapter one of them")
    return names[0]
