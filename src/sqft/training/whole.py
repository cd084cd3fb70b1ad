"""Masked full fine-tuning: the kept weights of the blocks' linear layers and the norms themselves are trained.

    W <- W - Adam(M o dL/dW)

With its gradient a pruned weight's moments stay 0, so steps, momentum and weight decay leave it at 0, bit for bit. What
is not trained (embeddings, head, biases of linear layers) is frozen. Half-precision weights are trained in float32 and
rounded once, at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqft.config import MergeConfig, TrainConfig
from sqft.errors import VerificationError
from sqft.folders import load, write_files
from sqft.kernels.dispatch import is_slow_half, pick_device
from sqft.models.discover import describe, norms
from sqft.models.types import Tokenizer
from sqft.models.weights import Weight, stored_state
from sqft.probe import logits, sample_tokens
from sqft.sparsity.masks import ZeroCounts, collect_masks, ensure_masks
from sqft.verify import verify

_HALF = (torch.float16, torch.bfloat16)


def masked_gradient(weight: Weight, gradient: Tensor) -> Tensor:
    """``M o G`` of a weight's parameter; a pruned weight's is 0 also where G is not finite."""
    if (mask_OI := weight.mask) is None:
        return gradient
    masked = gradient.clone()
    weight.part(masked).masked_fill_(~mask_OI, 0)
    return masked


@contextlib.contextmanager
def trainable(model: Any) -> Iterator[None]:
    """Holds a model so that a Trainer trains what the module says and nothing else, in place; afterwards dtypes and
    ``requires_grad`` are as before. Raises SqftError for a model that carries adapters or is of an unknown family,
    VerificationError if a pruned weight is not zero after all."""
    weights = list(describe(model).weights())
    ensure_masks(model)
    trained = {id(weight.parameter) for weight in weights}
    trained |= {id(parameter) for norm in norms(model).values() for parameter in norm.parameters()}
    before = [(parameter, parameter.dtype, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, dtype, _ in before:
        parameter.requires_grad_(id(parameter) in trained)
        if parameter.requires_grad or dtype in _HALF:  # a copy: the loaded one may be a mapped file
            parameter.data = parameter.data.to(torch.float32 if dtype in _HALF else dtype, copy=True)
    hooks = [weight.parameter.register_hook(partial(masked_gradient, weight)) for weight in weights]
    try:
        yield
        _check_zeros(weights)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, dtype, required in before:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(required)


def _check_zeros(weights: list[Weight]) -> None:
    counts = ZeroCounts()
    for weight in weights:
        counts.add(weight)
    if counts.filled:
        raise VerificationError(f"{counts.filled} of {counts.pruned} pruned weights are not zero after training: "
                                "this is a bug in sqft, please report it")  # fmt: skip


def precision_of(model: nn.Module, config: TrainConfig) -> TrainConfig:
    """The config, with 'auto' as what it means here: bfloat16 weights are multiplied in bfloat16 where that is fast."""
    slow = pick_device(config.device).type == "cpu" and is_slow_half(torch.bfloat16)
    half = next(model.parameters()).dtype == torch.bfloat16 and not slow
    return replace(config, precision="bfloat16") if half and config.precision == "auto" else config


def write_verified(model: Any, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Writes a trained model and compares what was written with it, as merging does. Returns the metrics; raises
    VerificationError for a pruned weight that is not zero, another mask, tensor, or logits."""
    tokens, masks = sample_tokens(model, tokenizer), collect_masks(model)
    before = logits(model, tokens)
    write_files(model, tokenizer, folder)
    written = load(folder, device=str(model.device))[0]
    return verify(written, before, tokens, MergeConfig().tolerance, masks, bool(masks), stored_state(model))
