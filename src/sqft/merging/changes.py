"""What merging changes: every tensor that an adapter trains, as it will be in the merged model. What is trained is
merged, or refused by name before anything is written."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from sqft.adapters.kinds import layer_kind
from sqft.adapters.peft_bridge import active_adapter, adapter_layers, is_masked, merged_weight
from sqft.config import MergeConfig
from sqft.errors import UsageError, VerificationError
from sqft.formats.checkpoint import packed_layers
from sqft.models.types import PeftModel
from sqft.quantization.linear import QuantLinear
from sqft.sparsity.masks import count_zeros, mask_of, packed_mask

Changes = dict[str, Callable[[], Tensor]]  # by name in the merged model's state dict; computed when called

LEAVES = ("qweight", "qzeros", "scales")  # of a packed layer, what merging writes
_FACTOR = re.compile(r"\.lora_(A\.weight|B\.weight|embedding_A|embedding_B|scales)$")


def merged_tensors(model: PeftModel) -> Changes:
    """Every tensor of the merged model that the active adapter trains. Raises UsageError, naming it, for a trained
    tensor that a merged model has no place for, and VerificationError for one that is not finite."""
    name = active_adapter(model)
    packed = lru_cache(maxsize=1)(lambda layer: layer.merged_packed(name))  # three tensors of one making
    found: Changes = {}
    for path, layer in adapter_layers(model).items():
        if name in layer.lora_A or name in layer.lora_embedding_A:
            found |= _of_layer(path, layer, name, packed)
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            _check_still_sparse(path, module, name)
            stored: Any = module.original_module.state_dict()  # what is trained in float32 computes rounded to this
            found |= {f"{path}.{leaf}": partial(torch.Tensor.to, tensor.detach(), stored[leaf].dtype)
                      for leaf, tensor in module.modules_to_save[name].state_dict().items()}  # fmt: skip
        elif isinstance(module, TrainableTokensWrapper) and name in module.token_adapter.trainable_tokens_delta:
            found[f"{path}.weight"] = partial(module.token_adapter.get_merged_weights, [name])
    for key, tensor in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items():
        trained = key.removeprefix("base_model.model.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise VerificationError(f"the adapter's {trained} has values that are not numbers: its training has "
                                    "diverged, train again with a smaller learning rate")  # fmt: skip
        target = _FACTOR.sub("", trained).removesuffix(".token_adapter.trainable_tokens_delta")
        bias = trained.replace(".base_layer.", ".")
        if bias.endswith(".bias") and ".lora_" not in bias:
            found.setdefault(bias, partial(torch.Tensor.detach, tensor))
        elif not {trained, f"{target}.weight", f"{target}.qweight"} & found.keys():
            raise _refusal(trained)
    _check_ties(model.get_base_model(), found)
    return found


def _refusal(trained: str) -> UsageError:
    return UsageError(f"the adapter trains {trained}, which cannot be merged into the base: serve base and adapter "
                      "together, or train an adapter without it")  # fmt: skip


def _of_layer(path: str, layer: Any, name: str, packed: Callable[[Any], Any]) -> Changes:
    if layer.merged:
        raise UsageError("the adapter is merged into the live model already: call unmerge_adapter() first")
    base = layer.get_base_layer()
    if layer_kind(layer).quantization_aware:
        return {f"{path}.{leaf}": lambda leaf=leaf: getattr(packed(layer), leaf) for leaf in LEAVES}
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None or getattr(base, "weight", torch.empty(0)).dim() != 2:
        raise _refusal(f"{path} by {type(variant or layer).__name__}")
    return {f"{path}.weight": lambda: merged_weight(layer, name)}


def _check_still_sparse(path: str, wrapper: Any, name: str) -> None:
    """Raises UsageError if ``modules_to_save`` trained a pruned layer: it was trained as a dense one."""
    for inner, module in wrapper.original_module.named_modules():
        mask_OI = mask_of(module)
        trained = wrapper.modules_to_save[name].get_submodule(inner)
        if mask_OI is not None and torch.count_nonzero(getattr(trained, "weight", mask_OI)[~mask_OI]):
            raise UsageError(f"modules_to_save trains {path}, which is pruned, as a dense layer: name it in "
                             "target_modules instead, so that its zeros are kept")  # fmt: skip


def _check_ties(base: Any, changes: Changes) -> None:
    """Raises UsageError if tensors that the model stores once would differ."""
    for one, other in dict(getattr(base, "all_tied_weights_keys", None) or {}).items():
        changed = [changes[name]() for name in (one, other) if name in changes]
        if changed and not (len(changed) == 2 and torch.equal(*changed)):
            trained, kept = (one, other) if one in changes else (other, one)
            raise UsageError(f"the adapter trains {trained} apart from {kept}, which this model stores as one tensor: "
                             "train it with ensure_weight_tying=True, or leave it out")  # fmt: skip


def check_mergeable(model: PeftModel, config: MergeConfig) -> Changes:
    """What merging will change. Raises UsageError for what cannot be merged, and for plain LoRA on a sparse model, with
    the sparsity that merging would leave."""
    layers = adapter_layers(model)
    if not layers:
        raise UsageError("this model has no adapters to merge")
    masked = is_masked(model)
    if not masked and packed_layers(model):
        raise UsageError(
            "a float LoRA cannot be merged into an INT model: the sum is not on its grid. Serve base and adapter "
            "together, or train quantization-aware adapters (adapter qa-sparse-peft), which merge"
        )
    changes = merged_tensors(model)
    bases: dict[str, Any] = {path: layer.get_base_layer() for path, layer in layers.items()}
    if masked or config.allow_dense or all(packed_mask(base) is None for base in bases.values()):
        return changes
    weights = {key: base.weight for path, base in bases.items() if (key := f"{path}.weight") in changes}
    total = sum(weight.numel() for weight in weights.values())
    with torch.no_grad():
        before = sum(count_zeros(weight) for weight in weights.values()) / total
        after = sum(count_zeros(changes[key]()) for key in weights) / total
    raise UsageError(
        f"merging plain LoRA would fill the pruned weights: the {len(weights)} adapted weights are {before:.2%} "
        f"sparse and would be {after:.2%}. Train masked adapters (adapter sparse-peft) to keep them, or pass "
        "--allow-dense (allow_dense=True) to merge all the same"
    )


def unload(model: PeftModel, undo: ExitStack) -> Any:
    """The base without PEFT's modules; ``undo`` puts everything back."""
    base: Any = model.get_base_model()
    inside = ()  # of a wrapper: other wrappers in it go with it
    for path, wrapper in list(base.named_modules()):
        if not isinstance(wrapper, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or path.startswith(inside):
            continue
        inside = f"{path}."
        if isinstance(wrapper, ModulesToSaveWrapper):
            inner = wrapper.original_module  # ``put`` gives it what was trained
        elif isinstance(wrapper, AuxiliaryTrainingWrapper):
            inner = wrapper.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
        else:
            inner = wrapper.get_base_layer()
        if isinstance(inner, QuantLinear):  # one of its own, so that the adapter's keeps its integers
            inner = copy.copy(inner)
            inner._buffers = {**inner._buffers, "fractions": None}  # which are of the base's integers
        parent, _, leaf = path.rpartition(".")
        undo.callback(setattr, base.get_submodule(parent), leaf, wrapper)
        setattr(base.get_submodule(parent), leaf, inner)
    if "peft_config" in vars(base):
        undo.callback(setattr, base, "peft_config", vars(base).pop("peft_config"))
    return base


@torch.no_grad()
def put(base: nn.Module, changes: Changes, undo: ExitStack) -> dict[str, Tensor]:
    """Computes the changes and puts them into an unloaded base; returns them. ``undo`` takes them out again."""
    tensors = {key: make() for key, make in changes.items()}
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        module = base.get_submodule(path)
        owner, name = (module, leaf) if leaf in module._buffers else (getattr(module, leaf), "data")
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, tensor)
    return tensors
