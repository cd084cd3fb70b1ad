"""The evaluate stage: a model, live or in a folder, to scores."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sqft import artifact
from sqft.adapters.kinds import layer_kind
from sqft.adapters.peft_bridge import adapter_layers, is_masked
from sqft.config import EvaluateConfig, to_dict
from sqft.elastic.handle import get_ranks, set_ranks
from sqft.elastic.heuristics import resolve_ranks
from sqft.errors import UsageError
from sqft.evaluation.harness import require_harness, run_harness
from sqft.evaluation.perplexity import perplexity
from sqft.evaluation.scoring import score
from sqft.folders import load
from sqft.formats.checkpoint import repack, unpack_model
from sqft.tasks.base import get_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate(model: nn.Module | str | Path, config: EvaluateConfig, *, tokenizer: PreTrainedTokenizerBase | None = None,
             out: str | Path | None = None, overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Scores a live model (needs ``tokenizer``) or a folder or hub name of any stage.

    Returns accuracy with interval for ``config.task``, perplexity with interval for ``config.text``, and seconds. With
    ``out``, a folder takes them and, for a task, ``predictions.jsonl``; of lm-eval also its ``results.json``.
    """
    if config.engine == "lm-eval":
        require_harness()
    task = get_task(config.task, config.data_dir) if config.task else None
    if task is not None:
        task.examples(config.split, 1)  # an unknown split is an error before any work
    if out is not None:
        artifact.check_output(out, overwrite)
    source, live = None, model
    if isinstance(model, (str, Path)):
        source = model
        live, tokenizer = load(model, dtype=config.dtype)
    if tokenizer is None:
        raise UsageError("evaluating a live model needs its tokenizer: pass tokenizer=...")
    assert isinstance(live, nn.Module)
    started = time.perf_counter()
    was_training = live.training
    live.eval()
    metrics: dict[str, Any] = {"ranks": config.ranks} if config.ranks else {}
    records: list[dict[str, Any]] = []
    harness: dict[str, Any] = {}
    with contextlib.ExitStack() as held:
        if config.ranks:
            held.enter_context(at_ranks(live, config.ranks, source))
        if config.unpack:
            held.enter_context(unpacked(live))
        if task is not None:
            if config.engine == "lm-eval":
                scores, records, harness = run_harness(live, tokenizer, task, config.split, config.limit,
                                                       config.fewshot, config.batch_size)  # fmt: skip
            else:
                scores, records = score(live, tokenizer, task, config.split, config.limit, config.batch_size)
            metrics.update(task=task.name, split=config.split, **scores)
        if config.text:
            batch = max(1, config.batch_size // 8)  # logits of whole windows are held, not of one token
            metrics.update(perplexity(live, tokenizer, config.text, config.length, config.max_tokens, batch))
    live.train(was_training)
    metrics["seconds"] = round(time.perf_counter() - started, 2)
    if out is not None:
        _write(Path(out), source, config, metrics, records, harness, overwrite)
    return metrics


@contextlib.contextmanager
def at_ranks(model: Any, choice: str, folder: str | Path | None) -> Iterator[None]:
    """Holds a super-adapter at the ranks that ``choice`` names. Raises UsageError as ``resolve_ranks``."""
    ranks = resolve_ranks(model, choice, folder or "")
    before = get_ranks(model)
    set_ranks(model, ranks)
    try:
        yield
    finally:
        set_ranks(model, before)


@contextlib.contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Holds packed weights de-quantized, and masked adapters merged, for a while: the same results, much faster.

    Every token of a generation would otherwise build the weights anew. Both are undone exactly.
    """
    merge = is_masked(model)
    weights: dict[Any, Any] = {}
    if merge:
        weights = {layer: layer.get_base_layer().weight.data for layer in adapter_layers(model).values()
                   if not layer_kind(layer).packed}  # fmt: skip
        model.merge_adapter()
    layers = unpack_model(model)
    try:
        yield
    finally:
        repack(model, layers)
        for layer, weight in weights.items():  # subtracting the adapter again would round
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters.clear()
        if merge and not weights:
            model.unmerge_adapter()


def _write(out: Path, source: str | Path | None, config: EvaluateConfig, metrics: dict[str, Any],
           records: list[dict[str, Any]], harness: dict[str, Any], overwrite: bool) -> None:  # fmt: skip
    with artifact.writing(out, overwrite) as folder:
        if records:
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (folder / "predictions.jsonl").write_text(lines, encoding="utf-8")
        if harness:
            text = json.dumps(harness, indent=2, ensure_ascii=False)
            (folder / "results.json").write_text(text + "\n", encoding="utf-8")
        artifact.write_manifest(folder, artifact.Manifest(
            stage="evaluate", config=to_dict(config), metrics=metrics,
            parent=artifact.relative_parent(source, out) if source else None,
            parent_key=artifact.folder_key(source) if source else "",
        ))  # fmt: skip
