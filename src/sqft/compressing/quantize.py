"""The quantize stage: a live model in place, or a folder block by block into a new, packed folder.

With ``first``, each block is pruned and then quantized in one walk. Two walks take turns on it: the pruning one feeds
blocks with what the pruned model gives, the quantizing one with what the pruned and quantized model gives. So the
result is that of the two stages run one after the other, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sqft import artifact
from sqft.calibration.statistics import Hessian
from sqft.calibration.walker import walk
from sqft.compressing import sparsify as sparsity
from sqft.config import QuantizeConfig, SparsifyConfig
from sqft.errors import UsageError
from sqft.formats.checkpoint import encoded, mark_packed, plan_tensors, quantization_config, write_quantize_config
from sqft.models.discover import Architecture, Block, describe, match_modules
from sqft.models.tensors import MAX_SHARD_BYTES, ModelWriter
from sqft.models.weights import Weight
from sqft.quantization.grid import GROUP_SIZES, Grid, GridSpec
from sqft.quantization.linear import QuantLinear
from sqft.quantization.rtn import Quantized
from sqft.registry import QUANTIZERS
from sqft.sparsity.masks import ZeroCounts, ensure_masks, save_masks, set_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Quantizer(Protocol):
    """``(w_OI, h_II, mask_OI, spec) -> Quantized``; ``h_II`` is None for methods without calibration."""

    def __call__(self, w_OI: Tensor, h_II: Any, mask_OI: Tensor | None, spec: GridSpec, *,
                 act_order: bool = False) -> Quantized: ...  # fmt: skip


WITHOUT_CALIBRATION = ("rtn",)


def quantize(model: PreTrainedModel | str | Path, config: QuantizeConfig | None = None,
             calibration: Tensor | str | None = None, *, first: SparsifyConfig | None = None,
             tokenizer: PreTrainedTokenizerBase | None = None, out: str | Path | None = None,
             overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Quantizes the linear weights of the decoder blocks; pruned weights stay exactly zero.

    Args:
        model: a live float model (its ``nn.Linear`` become ``QuantLinear``, in place) or a folder or hub name (then
            ``out`` is needed, and the model is read, quantized and written block by block).
        calibration: int64 [N, T] token blocks, or a source as in ``config.calibration``, which it replaces.
        first: prune in the same walk, with this config (its calibration is its own, unless ``calibration`` is given).
        tokenizer: needed for a live model with a calibration source.
        out: folder to write to; ``overwrite`` replaces an earlier stage folder there.

    Returns the metrics: bits, zeros kept, sparsity, seconds. Raises UsageError for options that do not fit the model
    (a group size that does not divide a width, before any work), SqftError otherwise.
    """
    config = config or QuantizeConfig()
    QUANTIZERS[config.method]
    if isinstance(model, (str, Path)):
        if out is None:
            raise UsageError("quantize of a folder needs an output folder")
        return _quantize_folder(str(model), config, calibration, first, Path(out), overwrite)
    if out is not None:
        raise UsageError("a live model is quantized in place: write it with sqft.save(model, tokenizer, folder)")
    started = time.perf_counter()
    architecture = describe(model)
    names = plan(architecture, config)
    ensure_masks(model)
    counts = Counts()
    for block in _steps(architecture, names, config, calibration, first, tokenizer):
        counts.add_block(block)
    mark_packed(model, config.format)
    return counts.quantized(config, model, time.perf_counter() - started)


def _quantize_folder(source: str, config: QuantizeConfig, calibration: Tensor | str | None,
                     first: SparsifyConfig | None, out: Path, overwrite: bool) -> dict[str, Any]:  # fmt: skip
    artifact.check_output(out, overwrite)
    started = time.perf_counter()
    model, tokenizer = sparsity.load_sparse(source, config.dtype)
    architecture = describe(model)
    names = plan(architecture, config)
    settings = sparsity.identity(config, calibration)
    if first is not None:
        settings["first"] = sparsity.identity(first, calibration)
    counts, masks = Counts(), {}
    templates = {w.name: template(w, config) for w in architecture.weights() if w.name in names}
    with artifact.writing(out, overwrite) as folder:
        writer = ModelWriter(plan_tensors(model, templates, config.format), folder, MAX_SHARD_BYTES)
        for block in _steps(architecture, names, config, calibration, first, tokenizer):
            counts.add_block(block)
            for name, tensor in encoded(block.module, config.format, block.name + "."):
                writer.add(name, tensor)
            masks.update(sparsity.take_masks(block))
            block.module.to("meta")
        model.config.quantization_config = quantization_config(model, templates, config.format)
        metrics = counts.quantized(config, model, time.perf_counter() - started)
        sparsity.finish(model, tokenizer, writer, folder)
        write_quantize_config(model.config.quantization_config, folder)
        if masks:
            save_masks(masks, folder)
        artifact.write_manifest(folder, artifact.Manifest(
            stage="quantize", config=settings, seed=config.seed, metrics=metrics,
            parent=artifact.relative_parent(source, out), parent_key=artifact.folder_key(source),
        ))  # fmt: skip
    return metrics


def plan(architecture: Architecture, config: QuantizeConfig) -> set[str]:
    """Full names of the modules to quantize.

    Raises UsageError for a pattern that matches nothing, or a group size, or a width at these bits, that does not fit.
    """
    names = architecture.names()
    excluded = {name for hits in match_modules(config.exclude, names, "exclude").values() for name in hits}
    chosen = {w.name: w for w in architecture.weights() if w.name not in excluded}
    if not chosen:
        raise UsageError("every module is excluded: nothing is left to quantize")
    packed = [name for name, weight in chosen.items() if weight.packed]
    if packed:
        raise UsageError(f"{packed[0]} is packed already: quantize the float model")
    fitting = [s for s in GROUP_SIZES if s == -1 or all(w.shape[1] % s == 0 for w in chosen.values())]
    for name, weight in chosen.items():
        outputs, inputs = weight.shape
        if config.group_size not in fitting:
            if config.group_size != -1 and inputs % config.group_size == 0:
                continue
            sizes = ", ".join(map(str, fitting))
            raise UsageError(f"group size {config.group_size} does not divide the {inputs} inputs of "
                             f"{name}: these fit the whole model: {sizes}; or exclude the module")  # fmt: skip
        if inputs * config.bits % 32 or outputs * config.bits % 32:
            raise UsageError(f"{name} is [{outputs}, {inputs}]: at {config.bits} bits both "
                             "have to fill 32-bit words; exclude the module")  # fmt: skip
    return set(chosen)


def template(weight: Weight, config: QuantizeConfig) -> QuantLinear:
    """An empty layer of the shape that the weight's module will have, for names, shapes and dtypes."""
    outputs, inputs = weight.shape
    layer = QuantLinear(inputs, outputs, config.bits, config.group_size, bias=weight.bias is not None, device="meta",
                        dtype=weight.dtype)  # fmt: skip
    layer.symmetric = config.symmetric
    return layer


def _steps(architecture: Architecture, names: set[str], config: QuantizeConfig, calibration: Tensor | str | None,
           first: SparsifyConfig | None, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Block]:  # fmt: skip
    """Quantizes (with ``first``, prunes and quantizes) block after block and yields each when it is finished."""
    needless = config.method in WITHOUT_CALIBRATION
    tokens = sparsity.calibration_tokens(config, calibration, tokenizer, needless)
    quantizing = quantize_blocks(architecture, names, config, tokens)
    if first is None:
        return quantizing
    needless = first.method in sparsity.WITHOUT_CALIBRATION
    tokens = sparsity.calibration_tokens(first, calibration, tokenizer, needless)
    pruning = sparsity.prune(architecture, sparsity.make_plan(architecture, first), first, tokens)
    return (block for _, block in zip(pruning, quantizing, strict=False))


def quantize_blocks(architecture: Architecture, names: set[str], config: QuantizeConfig,
                    tokens: Tensor | None) -> Iterator[Block]:  # fmt: skip
    """Walks the blocks and quantizes the named modules; each block is yielded with its ``QuantLinear`` in place."""
    method: Quantizer = QUANTIZERS[config.method]
    spec = GridSpec(config.bits, config.group_size, config.symmetric, config.clip, config.scale_bits)
    done: dict[str, QuantLinear] = {}

    def change(block: Block, statistics: dict[str, Hessian]) -> None:
        groups: dict[int, list[str]] = {}
        for name in statistics or block.weights:
            if name in names:
                groups.setdefault(id(statistics.get(name, name)), []).append(name)
        for group in groups.values():
            weights = [block.weights[name] for name in group]
            h_II = statistics[group[0]].matrix() if statistics else None
            masks = [weight.mask for weight in weights]
            quantized = _together(method, weights, masks, h_II, spec, config.act_order)
            for weight, mask_OI, result in zip(weights, masks, quantized, strict=True):
                layer = QuantLinear.from_quantized(result, config.group_size, config.symmetric, weight.bias)
                if mask_OI is not None:
                    set_mask(layer, mask_OI)
                done[weight.name] = layer
                # Until the block is finished it computes with the float form of its integers, which gives the same.
                weight.write(result.weight())

    progress = f"Quantize ({config.method}, {config.bits} bits)"
    for block in walk(architecture, tokens, config.batch_size, Hessian, change, progress, sparsity.accelerator(),
                      config.true_sequential, fast=True):  # fmt: skip
        for name, weight in block.weights.items():
            if name in done:
                weight.replace(done.pop(name).to(weight.device))
        yield block


def _together(method: Quantizer, weights: Sequence[Weight], masks: Sequence[Tensor | None], h_II: Tensor | None,
              spec: GridSpec, act_order: bool) -> list[Quantized]:  # fmt: skip
    """Quantizes weights that share an input (q, k and v) as one weight: rows do not depend on each other."""
    w_OI = torch.cat([weight.read() for weight in weights])
    mask = None
    if any(mask is not None for mask in masks):
        mask = torch.cat([torch.ones(weight.shape, dtype=torch.bool, device=w_OI.device) if mask is None else mask
                          for weight, mask in zip(weights, masks, strict=True)])  # fmt: skip
    q_OI, grid = method(w_OI, h_II, mask, spec, act_order=act_order)
    rows = [weight.shape[0] for weight in weights]
    parts = zip(q_OI.split(rows), grid.scale_OG.split(rows), grid.zero_OG.split(rows), strict=True)
    return [Quantized(q, Grid(spec.bits, scale, zero)) for q, scale, zero in parts]


class Counts(ZeroCounts):
    """Of packed layers, with the bits that they take."""

    bits: int = 0

    def add_block(self, block: Block) -> None:
        for weight in block.weights.values():
            layer = weight.module
            if isinstance(layer, QuantLinear):
                self.add(weight)
                self.bits += 8 * sum(t.numel() * t.element_size() for t in (layer.qweight, layer.qzeros, layer.scales))

    def quantized(self, config: QuantizeConfig, model: nn.Module, seconds: float) -> dict[str, Any]:
        """The stage's metrics."""
        others = sum(p.numel() for n, p in model.named_parameters() if "qweight" not in n)
        return {
            "bits": config.bits, "bits_per_weight": self.bits / max(1, self.weights), **self.metrics(),
            "parameters": self.weights + others, "seconds": round(seconds, 2),
        }  # fmt: skip
