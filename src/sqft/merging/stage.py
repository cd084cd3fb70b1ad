"""Merging: one model from base and adapter, verified before anybody sees it.

Checked are the zeros (every pruned weight is 0.0 bit for bit), every tensor that was trained (an INT model's integers
are those that training rounded to, on the base's zero points) and the logits (merged equals un-merged). What fails is
not written, and a live model is as it was. A folder is merged tensor by tensor; the base is mapped from its files, and
never are two models held.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sqft import artifact
from sqft.adapters.groups import Ranks
from sqft.adapters.peft_bridge import adapter_layers, is_masked
from sqft.config import MergeConfig
from sqft.elastic.handle import get_ranks, set_ranks
from sqft.elastic.heuristics import resolve_ranks
from sqft.errors import UsageError
from sqft.folders import is_adapter, load
from sqft.formats.checkpoint import count_parameters, packed_layers, save_packed
from sqft.formats.compact import compact_in_place
from sqft.merging.changes import LEAVES, Changes, check_mergeable, put, unload
from sqft.models.dense import save_settings
from sqft.models.reader import digest
from sqft.models.tensors import ModelWriter, layout
from sqft.models.types import PeftModel, Tokenizer
from sqft.models.weights import Weight, stored_state
from sqft.options import parse_size
from sqft.probe import check_probe, logits, sample_tokens
from sqft.quantization.linear import QuantLinear
from sqft.sparsity.masks import as_stored, collect_masks, packed_mask, save_masks, stored_masks
from sqft.verify import verify


def merge(adapter: PeftModel | str | Path, config: MergeConfig | None = None, *,
          ranks: Ranks | None = None, tokenizer: Tokenizer | None = None,
          out: str | Path | None = None, overwrite: bool = False) -> Any:  # fmt: skip
    """Merges an adapter into its base and verifies the result: all that the adapter trains, or none of it.

    Args:
        adapter: a live ``PeftModel`` (returns the merged ``transformers`` model, with its masks), or an adapter folder
            (then ``out`` is needed; returns the metrics).
        ranks: of a super-adapter (NLS), which of its sub-adapters, by rank group; or ``config.ranks`` names it. Without
            either: of a live model the ranks that are set, of a folder the largest.
        tokenizer: of a live model: logits are compared on text instead of random tokens.

    Raises UsageError for plain LoRA on a sparse model unless ``config.allow_dense`` (naming the sparsity that would be
    left) and for whatever else is trained that cannot be merged, VerificationError if a pruned weight is not zero, or
    a trained tensor or the logits differ. After an error a live model still has its adapter, bit for bit.
    """
    config = config or MergeConfig()
    if ranks is not None and config.ranks is not None:
        raise UsageError("give ranks or config.ranks, not both")
    if isinstance(adapter, (str, Path)):
        if out is None:
            raise UsageError("merging an adapter folder needs an output folder")
        return _merge_folder(Path(adapter), config, ranks, Path(out), overwrite)
    if out is not None:
        raise UsageError("a live model is merged in memory: write the result with sqft.save")
    if not adapter_layers(adapter):
        raise UsageError("this model has no adapters to merge")
    with ExitStack() as undo:
        if (chosen := _chosen(adapter, config, ranks, "")) is not None:
            undo.callback(set_ranks, adapter, get_ranks(adapter))
            set_ranks(adapter, chosen)
        changes, masked = check_mergeable(adapter, config), is_masked(adapter)
        tokens = sample_tokens(adapter, tokenizer)
        before = logits(adapter, tokens)
        merged = unload(adapter, undo)
        tensors = put(merged, changes, undo)
        verify(merged, before, tokens, config.tolerance, collect_masks(merged), masked, tensors.items())
        undo.pop_all()
    return merged


def _chosen(model: Any, config: MergeConfig, ranks: Ranks | None, folder: str | Path) -> Ranks | None:
    return ranks if config.ranks is None else resolve_ranks(model, config.ranks, folder)


def _merge_folder(adapter: Path, config: MergeConfig, ranks: Ranks | None, out: Path,
                  overwrite: bool) -> dict[str, Any]:  # fmt: skip
    given = None if ranks is None else {"ranks": ranks}
    with artifact.stage("merge", config, out, adapter, given=given, overwrite=overwrite) as made:
        if artifact.is_stage(adapter) and not is_adapter(adapter) and artifact.read_manifest(adapter).stage == "train":
            raise UsageError(f"{adapter} is one model already (it was trained without adapters): there is nothing to "
                             "merge, use it as it is")  # fmt: skip
        if not is_adapter(adapter):
            raise UsageError(f"{adapter} is not an adapter folder: give the folder that 'sqft train' wrote")
        model, tokenizer = load(adapter, device=config.device)
        tokens = sample_tokens(model, tokenizer)
        before = logits(model, tokens)
        check_probe(before, adapter)
        if (chosen := _chosen(model, config, ranks, adapter)) is not None:
            set_ranks(model, chosen)
            before = logits(model, tokens)
        changes, masked = check_mergeable(model, config), is_masked(model)
        base = unload(model, ExitStack())
        del model
        masks = collect_masks(base)
        stored, digests = _write(base, tokenizer, changes, made.folder, parse_size(config.max_shard_size))
        if masked:
            save_masks(stored, made.folder)
        del base
        merged = load(made.folder, device=config.device)[0]
        with torch.no_grad():
            expected = ((name, digests.get(name) or make()) for name, make in changes.items())
            made.metrics.update(verify(merged, before, tokens, config.tolerance, masks, masked, expected))
        made.metrics["parameters"] = count_parameters(merged)
        if config.compact:
            compact_in_place(made.folder)
    return made.metrics


def _write(base: Any, tokenizer: Tokenizer, changes: Changes, folder: Path,
           shard: int) -> tuple[dict[str, Tensor], dict[str, str]]:  # fmt: skip
    """Writes the merged model tensor by tensor. Returns its masks as a folder holds them, and digests of the changed
    tensors, so that none is made again to be compared."""
    packed, planned = packed_layers(base), layout(base)
    streamed = {f"{name}.{leaf}" for name in packed for leaf in LEAVES} if packed else planned.keys()
    apart = {name: make for name, make in changes.items() if name not in streamed}  # few, or slices: of one expert
    digests = {name: digest(tensor) for name, tensor in put(base, apart, ExitStack()).items()}
    with tqdm(total=len(changes), desc="Merge", unit="tensor", disable=None) as bar, torch.no_grad():

        def changed(name: str) -> Tensor:
            tensor = changes[name]()
            digests[name] = digest(tensor)
            bar.update()
            return tensor

        if packed:
            return _write_packed(base, tokenizer, changes, changed, folder, shard), digests
        writer = ModelWriter(planned, folder, shard)
        for name, tensor in stored_state(base):
            writer.add(name, changed(name) if name in changes else tensor)
    writer.close()
    save_settings(base, tokenizer, folder)
    return stored_masks(base), digests


def _write_packed(base: Any, tokenizer: Tokenizer, changes: Changes, changed: Callable[[str], Tensor], folder: Path,
                  shard: int) -> dict[str, Tensor]:  # fmt: skip
    """One layer after the other; which kept weights are zero now, its mask says."""
    stored: dict[str, Tensor] = {}

    def change(name: str, layer: QuantLinear) -> QuantLinear:
        merged = copy.copy(layer)
        merged._buffers = dict(layer._buffers)
        merged._buffers |= {leaf: changed(key) for leaf in LEAVES if (key := f"{name}.{leaf}") in changes}
        if (mask := packed_mask(layer)) is not None:
            stored[name] = as_stored(Weight(name, merged), mask)
        return merged

    save_packed(base, tokenizer, folder, shard, change)
    others = {name: mask for name, mask in collect_masks(base).items() if name not in stored}
    return stored | {name: as_stored(Weight(name, base.get_submodule(name)), mask) for name, mask in others.items()}
