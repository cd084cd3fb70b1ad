"""``sqft inspect``: what a model is to sqft, from its configuration alone: no weight is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from sqft.config import MergeConfig, QuantizeConfig, SparsifyConfig, TrainConfig
from sqft.errors import SqftError, UsageError
from sqft.measuring.size import human
from sqft.measuring.speed import measure
from sqft.models.dense import locate, skeleton
from sqft.models.discover import Architecture, describe, resolve_targets
from sqft.models.weights import Weight, is_linear
from sqft.planning import estimate
from sqft.quantization.grid import GROUP_SIZES
from sqft.recipe import resolve_model
from sqft.reporting.tables import Column, Table, duration, millions
from sqft.sparsity.pattern import Pattern

PATTERNS = ("2:4", "4:8", "16:32", "32:64", "64:128")
TRAINED = 100, 16, 256  # steps, sequences a step and tokens of one, for which training is estimated
CARDS, USABLE = (16, 24, 48, 80), 0.92  # GB of common GPUs, and what driver and fragments leave of them
COPIES = 24  # bytes a weight that is pruned or quantized on a GPU, while it is: in float32, scores, their order
AT_ONCE = 512  # tokens that training holds at a time, with activation checkpointing: the least that makes sense
PACKED, MASKED = 4.5 / 8, 1 / 8  # bytes a weight in INT4 with its grid, and of its mask


def inspect(model: str) -> dict[str, Any]:
    """The model's blocks, weights by kind, what stays as it is, which group sizes and N:M fit all of them, and the
    memory and time that each stage would take here with its default options. Raises SqftError for a model that sqft
    does not know, UsageError for a path that holds none."""
    source = resolve_model(model)
    _, gguf = locate(source)
    live = skeleton(source)
    architecture, shape = describe(live), estimate.shape_of(live)._replace(gguf=gguf is not None)
    weights = list(architecture.weights())
    adapted = set(resolve_targets(architecture, []))
    kinds: dict[tuple[str, tuple[int, int]], dict[str, Any]] = {}
    for weight in weights:
        kind = _without_numbers(weight.name), weight.shape
        row = kinds.setdefault(kind, {"weight": kind[0], "shape": list(weight.shape), "count": 0, "parameters": 0,
                                      "adapted": weight.name in adapted})  # fmt: skip
        row["count"] += 1
        row["parameters"] += math.prod(weight.shape)
    return {
        "model": model, "type": live.config.model_type, "family": architecture.family.name,
        "blocks": len(architecture.blocks), "parameters": shape.parameters, "in_blocks": shape.weights,
        "dtype": str(live.dtype).removeprefix("torch."), "bytes": int(shape.bytes), "kinds": list(kinds.values()),
        "kept": sorted(set(_kept(architecture))),
        "group_sizes": [size for size in GROUP_SIZES if size == -1 or all(w.shape[1] % size == 0 for w in weights)],
        "patterns": [pattern for pattern in PATTERNS if all(_fits(pattern, weight) for weight in weights)],
        "stages": _stages(live, architecture, shape, adapted),
        "gpu": on_gpu(estimate.adapted(shape, live, architecture, adapted, TrainConfig().r), weights),
    }  # fmt: skip


def _without_numbers(name: str) -> str:
    """'model.layers.3.mlp.experts.7.down_proj' -> 'model.layers.*.mlp.experts.*.down_proj'."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _fits(pattern: str, weight: Any) -> bool:
    try:
        Pattern.parse(pattern).check(weight.name, weight.shape)
    except (SqftError, UsageError):
        return False
    return True


def _kept(architecture: Architecture) -> Iterator[str]:
    """What of the blocks no stage touches: linear layers that the table keeps, parameters of two or more dimensions
    that are no linear layer's, and whole blocks that text does not run."""
    chosen = set(architecture.names())
    yield from architecture.whole
    for block in architecture.blocks:
        for name, module in block.module.named_modules():
            full = f"{block.name}.{name}"
            if full in chosen:
                continue
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1 or is_linear(module):
                    yield _without_numbers(f"{full}.{leaf}")


def _stages(live: Any, architecture: Architecture, shape: estimate.Shape, adapted: set[str]) -> list[dict[str, Any]]:
    """About what each takes here: as ``--dry-run`` estimates it."""
    speed = measure(live.dtype)
    steps, batch, length = TRAINED
    tuned = estimate.adapted(shape, live, architecture, adapted, TrainConfig().r)
    tokens = steps * batch * length
    training = estimate.train(tuned, TrainConfig(batch_size=batch), (steps, tokens, length))
    costs = {
        "sparsify": estimate.sparsify(shape, SparsifyConfig()), "quantize": estimate.quantize(shape, QuantizeConfig()),
        f"train, {steps} steps of {batch} x {length} tokens": training,
        "merge": estimate.merge(tuned, MergeConfig()),
    }  # fmt: skip
    found = []
    for name, cost in costs.items():
        cost += estimate.load(shape)
        found.append({"stage": name, "seconds": cost.seconds(speed), "memory_bytes": cost.memory})
    return found


def on_gpu(shape: estimate.Shape, weights: list[Weight]) -> list[dict[str, Any]]:
    """The bytes that stages hold on a GPU, by what they keep there (computed, not measured), and the smallest of
    ``CARDS`` that has them; ``shape`` with its adapter."""
    size, (largest, widest) = shape.itemsize, (max(map(f, weights)) for f in (_numel, lambda w: w.shape[1]))
    outside = shape.bytes - size * shape.weights
    config = QuantizeConfig()
    walk = shape.weights / shape.layers * size + COPIES * largest
    walk += config.batch_size * config.length * (shape.hidden + widest) * size
    training = AT_ONCE * (shape.layers * shape.hidden + 10 * shape.hidden + 3 * widest) * size
    training += estimate.LOGITS * estimate.CHUNK + estimate.ADAM * shape.factors + (2 * size + 4) * largest
    held = {
        "sparsify": walk, "quantize": walk + estimate.ROUNDED * widest**2,
        "train, float base": shape.bytes + MASKED * shape.weights + training,
        "train, INT4 base": outside + (PACKED + MASKED) * shape.weights + training,
        "evaluate, float": shape.bytes,
        "evaluate, INT4 (--no-unpack)": outside + PACKED * shape.weights + largest * size,
    }  # fmt: skip
    return [{"stage": stage, "memory_bytes": bytes, "fits": next((c for c in CARDS if bytes <= USABLE * 1e9 * c), None)}
            for stage, bytes in held.items()]  # fmt: skip


def _numel(weight: Weight) -> int:
    return math.prod(weight.shape)


def show(found: dict[str, Any]) -> None:
    """Prints it."""
    share = found["in_blocks"] / found["parameters"]
    print(f"{found['model']}: {found['type']} (row '{found['family']}' of docs/families.md), {found['blocks']} blocks, "
          f"{millions(found['parameters'])} parameters, {share:.0%} of them in the blocks' linear weights; "
          f"{human(found['bytes'])} in {found['dtype']}")  # fmt: skip
    adapted = Column("adapted by default", "adapted", lambda value: "yes" if value else "no")
    columns = (Column("weight", "weight"), Column("[out, in]", "shape"), Column("count", "count"),
               Column("parameters", "parameters", millions), adapted)  # fmt: skip
    Table(columns, found["kinds"]).show()
    print(f"Stays as it is: embeddings, norms, head{', ' + ', '.join(found['kept']) if found['kept'] else ''}")
    sizes = ", ".join("a row" if size == -1 else str(size) for size in found["group_sizes"])
    print(f"Group sizes that fit: {sizes}. N:M that fit: {', '.join(found['patterns']) or 'none'}")
    Table((Column("stage, default options", "stage"), Column("time here", "seconds", duration),
           Column("memory", "memory_bytes", human)), found["stages"]).show()  # fmt: skip
    Table((Column(f"on a GPU, {AT_ONCE} tokens at a time, checkpointing", "stage"),
           Column("computed", "memory_bytes", human),
           Column(f"fits, of {', '.join(map(str, CARDS))} GB", "fits", lambda card: f"{card} GB" if card else "none")),
          found["gpu"]).show()  # fmt: skip
