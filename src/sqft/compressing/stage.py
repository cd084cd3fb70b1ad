"""The stages ``sqft.sparsify`` and ``sqft.quantize``, and ``sqft.compress`` for several passes in one walk.

A live model is changed in place, a folder is read, changed and written block by block: the same path, with another
sink. With several passes a walk each takes turns on every block: the first feeds blocks with what the pruned model
gives, the second with what the pruned and quantized model gives. So the result is that of the stages run one after the
other, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sqft import artifact
from sqft.compressing.passes import Pass, Prune, Quantize
from sqft.compressing.sinks import Folder, InPlace, Sink, load_float
from sqft.config import QuantizeConfig, SparsifyConfig
from sqft.errors import UsageError
from sqft.models.discover import describe
from sqft.sparsity.masks import ensure_masks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sparsify(model: PreTrainedModel | str | Path, config: SparsifyConfig | None = None,
             calibration: Tensor | str | None = None, *, tokenizer: PreTrainedTokenizerBase | None = None,
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
    passes = [*([Prune(first)] if first else []), Quantize(config or QuantizeConfig())]
    return compress(model, passes, calibration, tokenizer=tokenizer, out=out, overwrite=overwrite)


def compress(model: PreTrainedModel | str | Path, passes: Sequence[Pass], calibration: Tensor | str | None = None, *,
             tokenizer: PreTrainedTokenizerBase | None = None, out: str | Path | None = None,
             overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Lets each of the passes (``Prune(config)``, ``Quantize(config)``) change each block, in this order.

    The other arguments are those of ``sparsify``. Returns the last pass's metrics; a folder is of its stage, and has
    its dtype.
    """
    last = passes[-1]
    if isinstance(calibration, str):
        for each in passes:
            each.config = replace(each.config, calibration=calibration)
        calibration = None
    if not isinstance(model, (str, Path)):
        if out is not None:
            raise UsageError("a live model is changed in place: write it with sqft.save(model, tokenizer, folder)")
        with artifact.stage(last.stage, last.config, None) as result:
            result.metrics.update(_walk(model, passes, calibration, tokenizer, InPlace()))
        return result.metrics
    if out is None:
        raise UsageError(f"{last.stage} of a folder needs an output folder")
    given: dict[str, Any] = dict(zip(("first", "second", "third"), (each.config for each in passes[:-1]), strict=False))
    if calibration is not None:
        given["calibration"] = "tokens:" + hashlib.sha256(calibration.numpy().tobytes()).hexdigest()
    with artifact.stage(last.stage, last.config, out, model, given=given, overwrite=overwrite) as result:
        live, tokenizer = load_float(model, last.config.dtype)
        result.metrics.update(_walk(live, passes, calibration, tokenizer, Folder(result, tokenizer)))
    return result.metrics


def _walk(model: Any, passes: Sequence[Pass], tokens: Tensor | None, tokenizer: PreTrainedTokenizerBase | None,
          sink: Sink) -> dict[str, Any]:  # fmt: skip
    """One walk over a model's blocks; returns the last pass's metrics."""
    architecture = describe(model)
    for each in passes:
        each.plan(architecture)
    ensure_masks(model)
    for each in passes:
        each.prepare(model, architecture, tokens, tokenizer)
    walks = [each.blocks(architecture) for each in passes]
    sink.receive((blocks[-1] for blocks in zip(*walks, strict=False)), model, passes[-1])
    return passes[-1].metrics(model)
