"""Reconstruction of a block with its mask fixed: the kept weights W, norm gains and biases g of a pruned block are
trained so that on the inputs X^ of the pruned model it gives what the dense block f gives on the dense model's, X:

    min over W, g, W = 0 where pruned, of  mean over tokens of  ||block(X^; W, g) - f(X)||^2 / ||f(X)||^2

by Adam. Layers can make good each other's errors, which repair of one layer at a time cannot (arXiv 2510.14444). A
token's error counts relative to its size, since the norms that follow take sizes away. Some calibration text is held
out: the weights of the epoch with the least error on it are kept, or those before (arXiv 2406.15524: reconstruction can
over-fit).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HELD_OUT = 8  # one batch of so many
PATIENCE = 3  # epochs without a better held-out error, after which training ends

Forward = Callable[[Mapping[str, Tensor], int], Tensor]


class Reconstruction(NamedTuple):
    """The tensors, the held-out errors before and after, and the epochs that were trained."""

    tensors: dict[str, Tensor]
    before: float
    after: float
    epochs: int


def held_out(batches: int) -> list[int]:
    """Which batches are not trained on: every eighth, at least the last."""
    return list(range(HELD_OUT - 1, batches, HELD_OUT)) or [batches - 1]


def reconstruct(forward: Forward, start: Mapping[str, Tensor], masks: Mapping[str, Tensor], targets: Sequence[Tensor],
                epochs: int, learning_rate: float, seed: int) -> Reconstruction:  # fmt: skip
    """Trains the tensors of a block.

    Args:
        forward: the block's output [..., hidden] of one batch, by its number, with these tensors for its parameters.
        start: the parameters to train, by name, of any float dtype; trained in float32 (in float64 if they are that).
        masks: bool, shaped as the parameters of these names; False where it is 0 and stays so.
        targets: of each batch the output that is wanted; at least two.
        learning_rate: of the first step; it falls to 0 as a cosine does.
        seed: of the order of batches.

    Returns tensors in ``start``'s dtypes; those of ``start`` if no epoch had a lower held-out error.
    """
    tensors = {name: _wide(tensor).requires_grad_() for name, tensor in start.items()}
    held = held_out(len(targets))
    train = [i for i in range(len(targets)) if i not in held]
    optimizer = torch.optim.Adam(tensors.values(), lr=learning_rate, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    best, since, epoch = dict(start), 0, 0
    before = least = _mean_error(forward, tensors, targets, held)
    for epoch in range(1, epochs + 1):
        for step, k in enumerate(torch.randperm(len(train), generator=generator).tolist()):
            part = (epoch - 1 + step / len(train)) / epochs
            optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * part)) / 2
            _step(optimizer, forward, tensors, masks, targets[train[k]], train[k])
        error = _mean_error(forward, tensors, targets, held)
        since += 1
        if error < least:
            least, since = error, 0
            best = {name: tensor.detach().to(start[name].dtype, copy=True) for name, tensor in tensors.items()}
        if since == PATIENCE or not math.isfinite(error):
            break
    return Reconstruction(best, before, least, epoch)


def _step(optimizer: torch.optim.Optimizer, forward: Forward, tensors: Mapping[str, Tensor],
          masks: Mapping[str, Tensor], target: Tensor, batch: int) -> None:  # fmt: skip
    with torch.enable_grad():
        loss = relative_error(forward(tensors, batch), target)
        gradients = torch.autograd.grad(loss, list(tensors.values()))
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        tensor.grad = gradient.mul_(masks[name]) if name in masks else gradient
    optimizer.step()
    for name, mask in masks.items():
        tensors[name].detach().mul_(mask)


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the squared distance over the target's squared norm. Both: [..., hidden]."""
    target = _wide(target).to(y.device)
    distance = (y.to(target.dtype) - target).square().sum(-1)
    return (distance / target.square().sum(-1).clamp_min(1e-12)).mean()


@torch.no_grad()
def _mean_error(
    forward: Forward, tensors: Mapping[str, Tensor], targets: Sequence[Tensor], batches: Iterable[int]
) -> float:
    errors = [relative_error(forward(tensors, i), targets[i]) for i in batches]
    return float(torch.stack(errors).mean())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
