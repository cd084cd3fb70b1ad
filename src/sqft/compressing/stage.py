"""The stages ``sqft.sparsify`` and ``sqft.quantize``, and ``sqft.compress`` for several passes in one walk.

A live model is changed in place, a folder is read, changed and written block by block: the same path, with another
sink. With several passes a walk each takes turns on every block: the first feeds blocks with what the pruned model
gives, the second with what the pruned and quantized model gives. So the result is that of the stages run one after the
other, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sqft.compressing.passes import Pass, Prune, Quantize
from sqft.compressing.sinks import Folder, InPlace, Sink
from sqft.config import QuantizeConfig, SparsifyConfig
from sqft.errors import UsageError
from sqft.models.discover import describe

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
    started = time.perf_counter()
    last = passes[-1]
    sink: Sink = InPlace()
    if isinstance(model, (str, Path)):
        if out is None:
            raise UsageError(f"{last.stage} of a folder needs an output folder")
        sink = Folder(str(model), Path(out), overwrite, _settings(passes, calibration))
        model, tokenizer = sink.load(last.config.dtype)
    elif out is not None:
        raise UsageError("a live model is changed in place: write it with sqft.save(model, tokenizer, folder)")
    architecture = describe(model)
    for each in passes:
        each.plan(architecture)
    for each in passes:
        each.prepare(model, architecture, calibration, tokenizer)
    walks = [each.blocks(architecture) for each in passes]
    finished = (blocks[-1] for blocks in zip(*walks, strict=False))

    def metrics() -> dict[str, Any]:
        return {**last.metrics(model), "seconds": round(time.perf_counter() - started, 2)}

    return sink.receive(finished, model, last, metrics)


def _settings(passes: Sequence[Pass], calibration: Tensor | str | None) -> dict[str, Any]:
    """The manifest's config: of the last pass, with that of the pass before it under 'first'."""
    settings: dict[str, Any] = {}
    for each in passes:
        settings = each.identity(calibration) | ({"first": settings} if settings else {})
    return settings
