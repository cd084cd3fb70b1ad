"""Scores on a task: accuracy, of multiple choice by log-likelihood and of the others by greedy generation, and the mean
loss of the completions, which takes one forward a batch and is finer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from sqft.adapters.kinds import layer_kind
from sqft.adapters.peft_bridge import adapter_layers, is_masked
from sqft.errors import Note, SqftError
from sqft.evaluation.choices import choose
from sqft.evaluation.generation import solve
from sqft.evaluation.intervals import wilson
from sqft.formats.checkpoint import packed_layers, unpack_model
from sqft.kernels.halves import fast_halves
from sqft.limits import memory_left
from sqft.models.discover import input_device
from sqft.models.types import Tokenizer
from sqft.models.weights import put_module
from sqft.tasks.base import Example, Task
from sqft.training.data import IGNORED, collate, is_learnt, tokenize


@contextlib.contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Holds packed weights de-quantized, and masked adapters merged, for a while: the same results, much faster than to
    build them for every token. Both are undone exactly; adapters that were merged before stay merged. Where memory does
    not suffice it says so, and leaves all as it is."""
    layers: list[Any] = list(adapter_layers(model).values()) if is_masked(model) else []
    if any(layer.merged for layer in layers):
        layers = []
    packed = packed_layers(model)
    weights = {layer: layer.get_base_layer().weight.data for layer in layers if not layer_kind(layer).packed}
    if not _fit(packed, weights, model):
        yield
        return
    try:
        if layers:
            model.merge_adapter()
        unpack_model(model)
        with fast_halves(model):
            yield
    finally:
        for name, module in packed.items():
            put_module(model, name, module)
        for layer in layers:
            if layer in weights:  # subtracting the adapter again would round
                layer.get_base_layer().weight.data = weights[layer]
                layer.merged_adapters.clear()
            elif layer.merged:
                layer.unmerge()


def _fit(packed: Mapping[str, Any], weights: Mapping[Any, torch.Tensor], model: Any) -> bool:
    """Whether all these packed and adapted weights of the model can be built and held at once."""
    sizes = [layer.in_features * layer.out_features for layer in packed.values()]
    needed = model.dtype.itemsize * sum(sizes + [weight.numel() for weight in weights.values()])
    if not needed or input_device(model).type != "cpu":
        return True
    left = memory_left()
    if needed > left:
        warnings.warn(f"the weights would take {needed / 1e9:.1f} GB at once, and {left / 1e9:.1f} are left: each is "
                      "built when it is used, which is slower", Note, stacklevel=2)  # fmt: skip
    return needed <= left


def score(model: Any, tokenizer: Tokenizer, task: Task, split: str, limit: int | None, batch_size: int,
          quiet: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """Metrics and one record a problem (prompt, generated, answer, correct), in the task's order."""
    examples = task.examples(split, limit)
    if not examples:
        raise SqftError(f"the {split} split of task {task.name} has no problems: there is nothing to score")
    chosen = [i for i, example in enumerate(examples) if example.options]
    written = [i for i, example in enumerate(examples) if not example.options]
    records: dict[int, dict[str, Any]] = {}
    if chosen:
        of_choices = choose(model, tokenizer, [examples[i] for i in chosen], batch_size, quiet)
        records.update(zip(chosen, of_choices, strict=True))
    if written:
        solved = solve(model, tokenizer, task, [examples[i] for i in written], batch_size, quiet)
        records.update(zip(written, solved, strict=True))
    ordered = [{**records[i], "task": examples[i].task or task.name} for i in range(len(examples))]
    return summarize(ordered), ordered


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy with Wilson's 95 % interval, and ``accuracy_norm`` if every record has it; of several tasks that of each
    and, as ``accuracy``, their mean (tasks count the same), with the interval of all problems together."""
    correct = sum(record["correct"] for record in records)
    metrics: dict[str, Any] = {
        "accuracy": correct / len(records),
        "accuracy_ci95": list(wilson(correct, len(records))),
        "correct": correct,
        "problems": len(records),
    }
    if all("correct_norm" in record for record in records):
        metrics["accuracy_norm"] = sum(record["correct_norm"] for record in records) / len(records)
    names = list(dict.fromkeys(record["task"] for record in records))
    if len(names) > 1:
        parts = {name: summarize([record for record in records if record["task"] == name]) for name in names}
        metrics["tasks"] = parts
        metrics["accuracy"] = sum(part["accuracy"] for part in parts.values()) / len(parts)
    return metrics


@torch.no_grad()
def completion_loss(model: Any, tokenizer: Tokenizer, examples: Sequence[Example], batch_size: int) -> float:
    """Cross-entropy a token of all completions together, in nats. Nothing is cut: raises SqftError for an example that
    is longer than the model takes."""
    rows = sorted(filter(is_learnt, (tokenize(e, tokenizer) for e in examples)), key=lambda row: len(row["input_ids"]))
    if not rows:
        raise SqftError("no completion to score: check the task's templates")
    longest = len(rows[-1]["input_ids"])
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise SqftError(f"an example has {longest} tokens, but the model takes {limit}: choose shorter ones (with a "
                        "limit, or another task)")  # fmt: skip
    device = input_device(model)
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = {key: values.to(device) for key, values in collate(rows[start : start + batch_size], 0).items()}
        target = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits
        kept = target != IGNORED
        total += float(F.cross_entropy(logits[:, :-1][kept].float(), target[kept], reduction="sum"))
        count += int(kept.sum())
        del logits  # before the next are made
    return total / count
