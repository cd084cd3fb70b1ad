"""Embeddings and head, which no stage compresses: what they are stored in. They are half of a small INT model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sqft.kernels.rows import round_rows
from sqft.models.tensors import pieces, same
from sqft.models.weights import store, stored

HALVES = (torch.float16, torch.bfloat16)


def embeddings(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that turn tokens into vectors and vectors into logits, by the names of their weights."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    for name, module in model.named_modules():
        if any(module is end for end in ends):
            yield f"{name}.weight", module


@torch.no_grad()
def half_dtype(model: Any, asked: str) -> torch.dtype | None:
    """What the option ``embeddings`` means for this model: None is as they are. 'auto' and 'int8': float32 becomes
    float16 if that holds its range, else bfloat16."""
    if asked in ("float16", "bfloat16"):
        return getattr(torch, asked)
    wide = [w for _, module in embeddings(model) if (w := stored(module, "weight")).dtype == torch.float32]
    if asked == "keep" or not wide:
        return None
    largest = max((float(rows.abs().max()) for w in wide if not w.is_meta for rows in pieces(w)), default=0.0)
    return torch.float16 if largest <= torch.finfo(torch.float16).max else torch.bfloat16


def planned_dtypes(model: Any, asked: str) -> dict[str, torch.dtype]:
    """What the option stores in another dtype than the model's, by name."""
    half = half_dtype(model, asked)
    return {} if half is None else {name: half for name, _ in embeddings(model)}


def rounding(model: Any, asked: str) -> Callable[[Tensor], Tensor]:
    """What makes of rows what the option says, in their own dtype; ``same``: nothing does."""
    half = half_dtype(model, asked)
    if asked == "int8":
        return lambda rows: round_rows(rows, half or rows.dtype)
    return same if half is None else lambda rows: rows.to(half).to(rows.dtype)


@torch.no_grad()
def round_embeddings(model: Any, asked: str) -> None:
    """Rounds the values of a live model as the option says; the dtype they are computed in stays."""
    if (change := rounding(model, asked)) is same:
        return
    for _, module in embeddings(model):
        weight = stored(module, "weight")
        store(module, "weight", torch.cat([change(rows) for rows in pieces(weight)]))
    model.tie_weights()


@torch.no_grad()
def exact_dtypes(model: Any) -> dict[str, torch.dtype]:
    """In what embeddings and head can be stored without loss, by name."""
    return {name: next((half for half in HALVES if _is_exact(weight, half)), weight.dtype)
            for name, module in embeddings(model)
            if (weight := stored(module, "weight")).dtype == torch.float32 and not weight.is_meta}  # fmt: skip


def _is_exact(weight: Tensor, half: torch.dtype) -> bool:
    return all(torch.equal(rows.to(half).to(rows.dtype), rows) for rows in pieces(weight))


@torch.no_grad()
def widen_embeddings(model: Any) -> None:
    """What was stored in half precision beside float32 computes in float32."""
    wide = any(p.dtype == torch.float32 for p in model.parameters())
    for _, module in embeddings(model) if wide else ():
        weight: Any = module.weight
        if weight.dtype in HALVES:
            store(module, "weight", weight.float())
    model.tie_weights()
