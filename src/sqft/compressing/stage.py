"""The stages ``sqft.sparsify`` and ``sqft.quantize``, and ``sqft.compress`` for several passes in one walk.

A live model is changed in place; of a folder each block is written and dropped before the next one is touched. With
several passes a walk each takes turns on every block: the first feeds blocks with what the pruned model gives, the
second with what the pruned and quantized one gives. The result is that of one stage after the other, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sqft import artifact
from sqft.compressing.kept import Kept
from sqft.compressing.passes import Pass, Prune, Quantize
from sqft.config import QuantizeConfig, SparsifyConfig
from sqft.errors import UsageError
from sqft.formats.checkpoint import encoded, mark_packed, plan_tensors, quantization_config, write_quantize_config
from sqft.formats.fractions import save_fractions, stored_fractions
from sqft.models.convert import converted
from sqft.models.dense import load_dense, load_tokenizer, save_settings
from sqft.models.discover import Block, describe
from sqft.models.embeddings import embeddings, exact_dtypes, planned_dtypes, round_embeddings, rounding
from sqft.models.gguf import parsed_once
from sqft.models.mapping import read_only
from sqft.models.tensors import MAX_SHARD_BYTES, ModelWriter
from sqft.models.types import PreTrainedModel, Tokenizer
from sqft.processes import is_main_process
from sqft.sparsity.masks import attach_masks, ensure_masks, load_masks, save_masks, stored_masks


def sparsify(model: PreTrainedModel | str | Path, config: SparsifyConfig | None = None,
             calibration: Tensor | str | None = None, *, tokenizer: Tokenizer | None = None,
             out: str | Path | None = None, overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Prunes the linear weights of the decoder blocks and records the masks.

    Args:
        model: a live model (pruned in place) or a folder or hub name (then ``out`` is needed, and the model is read,
            pruned and written block by block).
        calibration: int64 [N, T] token blocks, or a source as in ``config.calibration``, which it replaces.
        tokenizer: needed for a live model with a calibration source.
        out: folder to write to; ``overwrite`` replaces an earlier stage folder there.

    Returns the metrics: sparsity overall and by module, number of weights and zeros, seconds. Raises UsageError for
    options that do not fit the model (before any work), SqftError otherwise.
    """
    passes = [Prune(config or SparsifyConfig())]
    return compress(model, passes, calibration, tokenizer=tokenizer, out=out, overwrite=overwrite)


def quantize(model: PreTrainedModel | str | Path, config: QuantizeConfig | None = None,
             calibration: Tensor | str | None = None, *, first: SparsifyConfig | None = None,
             tokenizer: Tokenizer | None = None, out: str | Path | None = None,
             overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Quantizes the linear weights of the decoder blocks; pruned weights stay exactly zero.

    Of a live float model the ``nn.Linear`` become ``QuantLinear``. With ``first`` it is pruned in the same walk, by
    that config (its calibration is its own, unless ``calibration`` is given). The others are as of ``sparsify``.

    Returns the metrics: bits, zeros kept, sparsity, seconds. Raises UsageError for options that do not fit the model
    (a group size that does not divide a width, before any work), SqftError otherwise.
    """
    passes = [*([Prune(first)] if first else []), Quantize(config or QuantizeConfig())]
    return compress(model, passes, calibration, tokenizer=tokenizer, out=out, overwrite=overwrite)


def compress(model: PreTrainedModel | str | Path, passes: Sequence[Pass], calibration: Tensor | str | None = None, *,
             tokenizer: Tokenizer | None = None, out: str | Path | None = None,
             overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Lets each of the passes (``Prune(config)``, ``Quantize(config)``) change each block, in this order; the rest is
    as of ``sparsify``. Returns the last pass's metrics; a folder is of its stage, and has its dtype."""
    last = passes[-1]
    if isinstance(calibration, str):
        for each in passes:
            each.config = replace(each.config, calibration=calibration)
        calibration = None
    if not isinstance(model, (str, Path)):
        if out is not None:
            raise UsageError("a live model is changed in place: write it with sqft.save(model, tokenizer, folder)")
        with artifact.stage(last.stage, last.config, None) as result:
            for _ in _walk(model, passes, calibration, tokenizer):
                pass
            if last.layers:
                mark_packed(model, last.format)
            round_embeddings(model, last.embeddings)
            result.metrics.update(last.metrics(model))
        return result.metrics
    if out is None:
        raise UsageError(f"{last.stage} of a folder needs an output folder")
    given: dict[str, Any] = dict(zip(("first", "second", "third"), (each.config for each in passes[:-1]), strict=False))
    if calibration is not None:
        given["calibration"] = "tokens:" + hashlib.sha256(calibration.numpy().tobytes()).hexdigest()
    with artifact.stage(last.stage, last.config, out, model, given=given, overwrite=overwrite) as result:
        for each in passes:
            each.kept = Kept(result.work("compressing") / each.stage)
        with parsed_once(model):
            source = converted(model, last.config.dtype, result.work("compressing") / "converted")
            with read_only():
                live, tokenizer = load_dense(source, last.config.dtype), load_tokenizer(model)
        attach_masks(live, load_masks(model))
        blocks = _walk(live, passes, calibration, tokenizer)
        if is_main_process():
            _write(blocks, live, last, tokenizer, result.folder)
        else:
            for block in blocks:
                block.module.to("meta")
        result.metrics.update(last.metrics(live))
    return result.metrics


def _walk(model: Any, passes: Sequence[Pass], tokens: Tensor | None, tokenizer: Tokenizer | None) -> Iterator[Block]:
    """One walk over a model's blocks: all is planned at once, and a block is finished when it is asked for."""
    architecture = describe(model)
    for each in passes:
        each.plan(architecture)
    ensure_masks(model)
    for each in passes:
        each.prepare(model, architecture, tokens, tokenizer)
    walks = [each.blocks(architecture) for each in passes]
    return (blocks[-1] for blocks in zip(*walks, strict=False))


def _write(blocks: Iterable[Block], model: Any, last: Pass, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a model as its blocks are finished, and drops them."""
    masks: dict[str, Tensor] = {}
    fractions: dict[str, Tensor] = {}
    dtypes = (exact_dtypes(model) if last.layers else {}) | planned_dtypes(model, last.embeddings)
    writer = ModelWriter(plan_tensors(model, last.layers, last.format, dtypes), folder, MAX_SHARD_BYTES)
    for block in blocks:
        for name, tensor in encoded(block.module, last.format, block.name + "."):
            writer.add(name, tensor)
        masks |= {f"{block.name}.{name}": mask for name, mask in stored_masks(block.module).items()}
        fractions |= {f"{block.name}.{name}": each for name, each in stored_fractions(block.module).items()}
        block.module.to("meta")
    if last.layers:
        model.config.quantization_config = quantization_config(model, last.layers, last.format)
        write_quantize_config(model.config.quantization_config, folder)
    rounded = dict.fromkeys((name for name, _ in embeddings(model)), rounding(model, last.embeddings))
    for name, tensor in model.state_dict().items():  # what is not in the blocks
        if tensor.device.type != "meta":
            writer.add(name, tensor, rounded.get(name))
    writer.close()
    save_settings(model, tokenizer, folder)
    if masks:
        save_masks(masks, folder)
    if fractions:
        save_fractions(fractions, folder)
