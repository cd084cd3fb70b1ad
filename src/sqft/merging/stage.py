"""Merging: one model from base and adapter, verified before anybody sees it.

Checked are the zeros (every pruned weight is 0.0 bit for bit), the grid (an INT model's integers are those that
training rounded to, on the base's scales and zero points) and the logits (merged equals un-merged). What fails is not
written. A folder is merged tensor by tensor; the base is mapped from its files, and never are two models held.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sqft import artifact
from sqft.adapters.groups import Ranks
from sqft.adapters.peft_bridge import active_adapter, adapter_layers, is_masked, is_quant_aware, merged_weight
from sqft.config import MergeConfig, parse_size, to_dict
from sqft.elastic.handle import set_ranks
from sqft.elastic.heuristics import resolve_ranks
from sqft.errors import UsageError, VerificationError
from sqft.folders import is_adapter, load
from sqft.formats.checkpoint import is_packed, load_packed, packed_layers, save_packed
from sqft.kernels.quant_ops import Packed, dequantized
from sqft.kernels.torch_ops import pack_mask, unpack_mask
from sqft.models.dense import load_dense, save_settings
from sqft.models.discover import describe, weight_of
from sqft.models.tensors import write_model
from sqft.probe import check_probe, logits, sample_tokens, tolerance
from sqft.sparsity.masks import (
    attach_masks,
    collect_masks,
    count_zeros,
    derive_mask,
    load_masks,
    save_masks,
    stored_masks,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def merge(adapter: PeftModel | str | Path, config: MergeConfig | None = None, *,
          ranks: Ranks | None = None, tokenizer: PreTrainedTokenizerBase | None = None,
          out: str | Path | None = None, overwrite: bool = False) -> Any:  # fmt: skip
    """Merges an adapter into its base and verifies the result.

    Args:
        adapter: a live ``PeftModel`` (returns the merged ``transformers`` model, with its masks), or an adapter folder
            (then ``out`` is needed; returns the metrics).
        ranks: of a super-adapter (NLS), which of its sub-adapters, by rank group; or ``config.ranks`` names it. Without
            either: of a live model the ranks that are set, of a folder the largest.
        tokenizer: of a live model: logits are compared on text instead of random tokens.

    Raises UsageError for plain LoRA unless ``config.allow_dense`` (naming the sparsity that would be left),
    VerificationError if a pruned weight is not zero or the logits differ.
    """
    config = config or MergeConfig()
    if isinstance(adapter, (str, Path)):
        if out is None:
            raise UsageError("merging an adapter folder needs an output folder")
        return _merge_folder(Path(adapter), config, ranks, Path(out), overwrite)
    if out is not None:
        raise UsageError("a live model is merged in memory: write the result with sqft.save")
    _set_ranks(adapter, config, ranks, "")
    check_mergeable(adapter, config)
    masked = is_masked(adapter)
    tokens = sample_tokens(adapter, tokenizer)
    before = logits(adapter, tokens)
    expected = expected_integers(adapter) if is_quant_aware(adapter) else {}
    merged: Any = adapter.merge_and_unload(safe_merge=True)
    if masked:
        check_zeros(merged, collect_masks(merged))
    check_integers(merged, expected)
    check_logits(before, logits(merged, tokens), config, masked)
    return merged


def _set_ranks(model: Any, config: MergeConfig, ranks: Ranks | None, folder: str | Path) -> None:
    if ranks is not None and config.ranks is not None:
        raise UsageError("give ranks or config.ranks, not both")
    if ranks is not None or config.ranks is not None:
        set_ranks(model, ranks if config.ranks is None else resolve_ranks(model, config.ranks, folder))


def _merge_folder(adapter: Path, config: MergeConfig, ranks: Ranks | None, out: Path,
                  overwrite: bool) -> dict[str, Any]:  # fmt: skip
    artifact.check_output(out, overwrite)
    if not is_adapter(adapter):
        raise UsageError(f"{adapter} is not an adapter folder: give the folder that 'sqft train' wrote")
    started = time.perf_counter()
    model, tokenizer = load(adapter)
    tokens = sample_tokens(model, tokenizer)
    check_probe(logits(model, tokens), adapter)
    _set_ranks(model, config, ranks, adapter)
    check_mergeable(model, config)
    masked, name = is_masked(model), active_adapter(model)
    before = logits(model, tokens)
    expected: dict[str, Packed] = {}
    with artifact.writing(out, overwrite) as folder:
        if is_quant_aware(model):
            expected = expected_integers(model)
            base: Any = model.merge_and_unload()
            save_packed(base, tokenizer, folder, parse_size(config.max_shard_size))
        else:
            layers = {f"{path}.weight": layer for path, layer in adapter_layers(model).items()}
            base = model.unload()
            _write_merged(base, layers, name, folder, config)
            save_settings(base, tokenizer, folder)
            del layers
        del model
        masks = _all_masks(base)
        if masked:
            attach_masks(base, masks)
            save_masks(stored_masks(base), folder)
        del base
        metrics = verify_folder(folder, before, tokens, config, masks, masked, expected)
        metrics["seconds"] = round(time.perf_counter() - started, 2)
        settings = to_dict(config) | ({} if ranks is None else {"ranks": ranks})
        artifact.write_manifest(folder, artifact.Manifest(
            stage="merge", config=settings, metrics=metrics,
            parent=artifact.relative_parent(adapter, out), parent_key=artifact.folder_key(adapter),
        ))  # fmt: skip
    return metrics


def _write_merged(base: Any, layers: dict[str, Any], adapter: str, folder: Path, config: MergeConfig) -> None:
    """Writes the base with the adapted weights merged; ``layers``: the adapted layers by weight name."""
    with tqdm(total=len(layers), desc="Merge", unit="weight", disable=None) as bar, torch.no_grad():

        def change(key: str, tensor: Tensor) -> Tensor:
            if key not in layers:
                return tensor
            bar.update()
            return merged_weight(layers[key], adapter)

        write_model(base, folder, parse_size(config.max_shard_size), change)


def verify_folder(folder: Path, before: Tensor, tokens: Tensor, config: MergeConfig, masks: Mapping[str, Tensor],
                  masked: bool, expected: Mapping[str, Packed]) -> dict[str, Any]:  # fmt: skip
    """Loads what was written and checks zeros, masks, integers and logits.

    Args:
        masks: the base's, packed, by module name.
        masked: False for a merge that is allowed to be dense: then zeros are counted only.
        expected: what training rounded each adapted INT weight to; empty for a float base.

    Returns the metrics. Raises VerificationError.
    """
    merged = load_packed(folder) if is_packed(folder) else load_dense(folder)
    metrics = check_zeros(merged, masks) if masked else zero_counts(merged, masks)
    if masked:
        attach_masks(merged, load_masks(folder))
        found = collect_masks(merged)
        if found.keys() != masks.keys() or not all(torch.equal(found[name], masks[name].cpu()) for name in masks):
            raise VerificationError("the masks of the merged model are not the base's: nothing was written; this is a "
                                    "bug in sqft, please report it")  # fmt: skip
    packed = packed_layers(merged).values()
    metrics["parameters"] = sum(p.numel() for p in merged.parameters()) + sum(
        layer.in_features * layer.out_features for layer in packed
    )
    if expected:
        metrics["bits"] = next(iter(packed)).bits
        metrics["integers_compared"] = check_integers(merged, expected)
    metrics["max_logit_difference"] = check_logits(before, logits(merged, tokens), config, masked)
    metrics["tokens_compared"] = tokens.numel()
    return metrics


def expected_integers(model: Any) -> dict[str, Packed]:
    """What training rounds each adapted weight to, by the base's module names, before anything is merged."""
    name = active_adapter(model)
    with torch.no_grad():
        found = {}
        layers: dict[str, Any] = dict(adapter_layers(model))
        for path, layer in layers.items():
            packed, linear = layer.merged_packed(name), layer.get_base_layer()
            weight = dequantized(packed, linear.in_features, torch.float32)
            if not torch.equal(weight.mT, layer.effective_weight(name)):
                raise VerificationError(f"the integers of {path} do not mean the weight that training multiplies with: "
                                        "nothing was written; this is a bug in sqft, please report it")  # fmt: skip
            found[path] = packed
    return found


def check_integers(merged: nn.Module, expected: Mapping[str, Packed]) -> int:
    """Compares integers, scales and zero points bit for bit; returns how many weights. Raises VerificationError."""
    count = 0
    for path, packed in expected.items():
        layer: Any = merged.get_submodule(path)
        for what in ("qweight", "qzeros", "scales"):
            if not torch.equal(getattr(layer, what), getattr(packed, what)):
                raise VerificationError(f"{path}.{what} of the merged model is not what training rounded to: nothing "
                                        "was written; this is a bug in sqft, please report it")  # fmt: skip
        count += layer.in_features * layer.out_features
    return count


def check_mergeable(model: Any, config: MergeConfig) -> None:
    """Refuses plain LoRA on a sparse model, with the sparsity that merging would leave."""
    layers = adapter_layers(model)
    if not layers:
        raise UsageError("this model has no adapters to merge")
    if is_masked(model):
        return
    if packed_layers(model):
        raise UsageError(
            "a float LoRA cannot be merged into an INT model: the sum is not on its grid. Serve base and adapter "
            "together, or train quantization-aware adapters (adapter qa-sparse-peft), which merge"
        )
    if config.allow_dense:
        return
    before = after = total = 0
    name = active_adapter(model)
    with torch.no_grad():
        for layer in layers.values():
            weight: Any = layer.get_base_layer().weight
            before += count_zeros(weight)
            after += count_zeros(merged_weight(layer, name))
            total += weight.numel()
    if before / total < 0.01:
        return  # a dense base loses nothing
    raise UsageError(
        f"merging plain LoRA would fill the pruned weights: the {len(layers)} adapted weights are {before / total:.2%} "
        f"sparse and would be {after / total:.2%}. Train masked adapters (adapter sparse-peft) to keep them, or pass "
        "--allow-dense (allow_dense=True) to merge all the same"
    )


def _all_masks(model: nn.Module) -> dict[str, Tensor]:
    """The model's masks, or, where another tool made it sparse, what its zeros say."""
    return collect_masks(model) or {name: pack_mask(derive_mask(module)) for name, module in describe(model).linears()}


def zero_counts(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """How many pruned weights are zero; ``masks``: packed, by module name."""
    pruned = filled = zeros = total = 0
    for name, packed in masks.items():
        weight = weight_of(model.get_submodule(name))
        dropped = ~unpack_mask(packed.to(weight.device), weight.shape[1])
        pruned += int(dropped.sum())
        filled += int(torch.count_nonzero(weight[dropped]))
        zeros += count_zeros(weight)
        total += weight.numel()
    kept = 1.0 if pruned == 0 else (pruned - filled) / pruned
    return {"pruned": pruned, "filled": filled, "zeros_kept": kept, "sparsity": zeros / total if total else 0.0,
            "zeros": zeros, "weights": total}  # fmt: skip


def check_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """``zero_counts``, raising VerificationError if a pruned weight is not zero."""
    counts = zero_counts(model, masks)
    if counts["filled"]:
        raise VerificationError(f"{counts['filled']} of {counts['pruned']} pruned weights are not zero after merging: "
                                "nothing was written; this is a bug in sqft, please report it")  # fmt: skip
    return counts


def check_logits(before: Tensor, after: Tensor, config: MergeConfig, masked: bool) -> float:
    """Largest difference of logits; raises VerificationError above the tolerance.

    A masked adapter multiplies with the very weight that is merged. Plain LoRA adds a second product, in another
    order of summation, so its tolerance follows the logits' size and precision.
    """
    difference = float((before.float() - after.float()).abs().max())
    allowed = config.tolerance if masked else max(config.tolerance, tolerance(before, before.dtype))
    if not difference <= allowed:  # also catches NaN
        raise VerificationError(f"merged and un-merged logits differ by {difference:.3g}, allowed are {allowed:.3g}: "
                                "nothing was written")  # fmt: skip
    return difference
