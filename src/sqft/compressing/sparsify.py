"""The sparsify stage: a live model in place, or a folder block by block into a new folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sqft import artifact
from sqft.calibration.data import token_blocks
from sqft.calibration.statistics import ColumnNorm
from sqft.calibration.walker import walk
from sqft.config import SparsifyConfig, parse_pattern, to_dict
from sqft.errors import SqftError, UsageError
from sqft.models.dense import load_dense, load_tokenizer, save_settings
from sqft.models.discover import Architecture, Block, describe, match_modules
from sqft.models.tensors import MAX_SHARD_BYTES, ModelWriter, layout
from sqft.models.weights import Weight
from sqft.registry import SPARSIFIERS
from sqft.sparsity.masks import (
    attach_masks,
    count_zeros,
    ensure_masks,
    load_masks,
    save_masks,
    stored_masks,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sparsifier(Protocol):
    """``(w_OI, norm_I, sparsity, pattern) -> mask_OI``; ``norm_I`` is None for methods without calibration."""

    def __call__(
        self, w_OI: Tensor, norm_I: Tensor | None, sparsity: float, pattern: tuple[int, int] | None
    ) -> Tensor: ...


WITHOUT_CALIBRATION = ("magnitude",)


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
    config = config or SparsifyConfig()
    SPARSIFIERS[config.method]
    if isinstance(model, (str, Path)):
        if out is None:
            raise UsageError("sparsify of a folder needs an output folder")
        return _sparsify_folder(str(model), config, calibration, Path(out), overwrite)
    if out is not None:
        raise UsageError("a live model is pruned in place: write it with sqft.save(model, tokenizer, folder)")
    started = time.perf_counter()
    architecture = describe(model)
    plan = make_plan(architecture, config)
    ensure_masks(model)
    tokens = calibration_tokens(config, calibration, tokenizer, config.method in WITHOUT_CALIBRATION)
    for _ in prune(architecture, plan, config, tokens):
        pass
    return _metrics(_count(architecture.weights()), model, time.perf_counter() - started)


def _sparsify_folder(
    source: str, config: SparsifyConfig, calibration: Tensor | str | None, out: Path, overwrite: bool
) -> dict[str, Any]:
    artifact.check_output(out, overwrite)
    started = time.perf_counter()
    model, tokenizer = load_sparse(source, config.dtype)
    architecture = describe(model)
    plan = make_plan(architecture, config)
    tokens = calibration_tokens(config, calibration, tokenizer, config.method in WITHOUT_CALIBRATION)
    counts: dict[str, tuple[int, int]] = {}
    masks: dict[str, Tensor] = {}
    with artifact.writing(out, overwrite) as folder:
        writer = ModelWriter(layout(model), folder, MAX_SHARD_BYTES)
        for block in prune(architecture, plan, config, tokens):
            counts.update(_count(block.weights.values()))
            for name, tensor in block.module.state_dict(prefix=block.name + ".").items():
                writer.add(name, tensor)
            masks.update(take_masks(block))
            block.module.to("meta")
        finish(model, tokenizer, writer, folder)
        save_masks(masks, folder)
        metrics = _metrics(counts, model, time.perf_counter() - started)
        artifact.write_manifest(folder, artifact.Manifest(
            stage="sparsify", config=identity(config, calibration), seed=config.seed, metrics=metrics,
            parent=artifact.relative_parent(source, out), parent_key=artifact.folder_key(source),
        ))  # fmt: skip
    return metrics


def load_sparse(source: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A float model, dense or sparse, with its masks if it has any, and its tokenizer."""
    if artifact.is_stage(source):
        artifact.check_files(source)
    model = load_dense(source, dtype)
    attach_masks(model, load_masks(source))
    ensure_masks(model)
    return model, load_tokenizer(source)


def finish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, writer: ModelWriter, folder: Path) -> None:
    """Writes what is not in the blocks: the other weights, configuration and tokenizer."""
    for name, tensor in model.state_dict().items():
        if tensor.device.type != "meta":
            writer.add(name, tensor)
    writer.close()
    save_settings(model, tokenizer, folder)


def make_plan(architecture: Architecture, config: SparsifyConfig) -> dict[str, tuple[float, tuple[int, int] | None]]:
    """What to do with each linear module: (sparsity, pattern) by full name; excluded modules are absent.

    Raises UsageError for a pattern that matches no module, an N:M that does not divide, or a ratio that prunes nothing.
    """
    names = architecture.names()
    overrides = match_modules(list(config.overrides), names, "override")
    excluded = {name for hits in match_modules(config.exclude, names, "exclude").values() for name in hits}
    pattern = parse_pattern(config.pattern) if config.pattern else None
    plan = {name: (config.sparsity, pattern) for name in names if name not in excluded}
    for key, hits in overrides.items():
        plan.update({name: (config.overrides[key], None) for name in hits if name not in excluded})
    for weight in architecture.weights():
        name, inputs = weight.name, weight.shape[1]
        if name not in plan:
            continue
        ratio, nm = plan[name]
        shape = f"{list(weight.shape)}"
        if nm and inputs % nm[1]:
            raise UsageError(
                f"pattern {nm[0]}:{nm[1]} does not divide the inputs of {name} {shape}: exclude the module"
            )
        if not nm and int(inputs * ratio) == 0:
            raise UsageError(f"sparsity {ratio} prunes nothing of {name} {shape}: a row has too few inputs")
    if not plan:
        raise UsageError("every module is excluded: nothing is left to prune")
    return plan


def prune(architecture: Architecture, plan: dict[str, tuple[float, tuple[int, int] | None]], config: SparsifyConfig,
          tokens: Tensor | None) -> Iterator[Block]:  # fmt: skip
    """Walks the blocks and prunes each by the plan; yields each when nothing needs it any more."""
    method: Sparsifier = SPARSIFIERS[config.method]

    def change(block: Block, statistics: dict[str, ColumnNorm]) -> None:
        for name, weight in block.weights.items():
            if name not in plan:
                continue
            sparsity, pattern = plan[name]
            norm_I = statistics[name].norm() if name in statistics else None
            _apply(weight, method(weight.read(), norm_I, sparsity, pattern))

    progress = f"Sparsify ({config.method})"
    return walk(architecture, tokens, config.batch_size, ColumnNorm, change, progress, accelerator())


def _apply(weight: Weight, mask_OI: Tensor) -> None:
    """Zeroes what the mask prunes, in a new tensor: the old one may be a file mapped into memory.

    What an earlier mask pruned stays pruned.
    """
    earlier = weight.mask
    if earlier is not None:
        mask_OI = mask_OI & earlier
    weight.write(torch.where(mask_OI, weight.read(), 0))
    weight.set_mask(mask_OI)


def accelerator() -> torch.device | None:
    """Where blocks are computed one by one: a GPU if there is one."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def calibration_tokens(config: Any, calibration: Tensor | str | None, tokenizer: PreTrainedTokenizerBase | None,
                       needless: bool = False) -> Tensor | None:  # fmt: skip
    """int64 [N, T] of a stage's config (or ``calibration``, which replaces its source); None where ``needless``."""
    if needless:
        return None
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.dtype != torch.int64:
            raise UsageError(f"calibration has to be int64 [N, T] token ids, not {calibration.dtype} "
                             f"{tuple(calibration.shape)}")  # fmt: skip
        return calibration
    if tokenizer is None:
        raise UsageError("calibration text needs a tokenizer: pass tokenizer=..., or token ids as calibration")
    return token_blocks(tokenizer, calibration or config.calibration, config.samples, config.length, config.seed)


def identity(config: Any, calibration: Tensor | str | None) -> dict[str, Any]:
    """The config as it goes into the manifest, with the calibration that was really used."""
    values = to_dict(config)
    if isinstance(calibration, str):
        values["calibration"] = calibration
    elif calibration is not None:
        values["calibration"] = "tokens:" + hashlib.sha256(calibration.numpy().tobytes()).hexdigest()
    return values


def take_masks(block: Block) -> dict[str, Tensor]:
    """The packed masks of a block's modules, by full name."""
    return {f"{block.name}.{name}": mask for name, mask in stored_masks(block.module).items()}


def _count(weights: Iterable[Weight]) -> dict[str, tuple[int, int]]:
    return {weight.name: (count_zeros(w_OI := weight.read()), w_OI.numel()) for weight in weights}


def _metrics(counts: dict[str, tuple[int, int]], model: nn.Module, seconds: float) -> dict[str, Any]:
    zeros, weights = (sum(values) for values in zip(*counts.values(), strict=True))
    if not weights:
        raise SqftError("the model has no weights to prune")
    return {
        "sparsity": zeros / weights,
        "zeros": zeros,
        "weights": weights,
        "parameters": sum(p.numel() for p in model.parameters()),
        "by_module": {name: round(zero / count, 6) for name, (zero, count) in counts.items()},
        "seconds": round(seconds, 2),
    }
