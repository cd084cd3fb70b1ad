"""Adapters that begin along the gradient of the loss (after LoRS, arXiv 2501.08582; LoRA-GA, arXiv 2407.05000).

With B = 0 step 0 is the base, bit for bit, and a first step of gradient descent changes s B A by -lr s^2 G A^T A: by G,
the gradient of the effective weight, projected onto the rows of A. Of all R orthogonal rows G's first right singular
vectors keep most of it.

Shape letters: T tokens, O output features, I input features, R rank.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer

from sqft.adapters.kinds import layer_kind
from sqft.adapters.peft_bridge import active_adapter, adapter_layers
from sqft.calibration.statistics import widest
from sqft.config import TrainConfig
from sqft.errors import UsageError
from sqft.kernels.dispatch import product
from sqft.sparsity.masks import mask_of
from sqft.training.data import is_learnt

BATCHES = 8  # of the training data, drawn by the seed


def gradient_rows(g_OI: Tensor, a_RI: Tensor) -> Tensor:
    """A [R, I] whose rows are the first right singular vectors of G, the largest first, as long as those of a random A
    (uniform within 1 / sqrt(I)) on average: sqrt(1/3). Rows beyond the rank of G are those of ``a_RI``."""
    g = g_OI.to(widest(g_OI.device))
    if g.shape[0] < g.shape[1]:
        squares, u_OO = torch.linalg.eigh(g @ g.mT)
        v_IN = g.mT @ u_OO
    else:
        squares, v_IN = torch.linalg.eigh(g.mT @ g)
    order = squares.flip(0)[: len(a_RI)]
    rank = int((order > 1e-10 * order[0]).sum()) if order[0] > 0 else 0
    rows_NI = v_IN.flip(1)[:, :rank].mT
    rows_NI = rows_NI / rows_NI.norm(dim=1, keepdim=True) / 3**0.5
    return torch.cat([rows_NI.to(a_RI.dtype), a_RI[rank:]])


def from_gradient(trainer: Trainer, config: TrainConfig) -> None:
    """Sets A of every adapted layer by the loss that is trained, on a few batches that the seed draws. A float32
    gradient of each adapted weight is held meanwhile. Raises UsageError for adapters that were trained before."""
    model: Any = trainer.model
    name = active_adapter(model)
    layers: dict[str, Any] = {path: layer for path, layer in adapter_layers(model).items() if name in layer.lora_A}
    if any(torch.count_nonzero(layer.lora_B[name].weight) for layer in layers.values()):
        raise UsageError("init gradient is for fresh adapters, and these were trained before: leave it out")
    rows = [row for row in cast(Any, trainer.train_dataset) if is_learnt(row)]
    drawn = random.Random(config.seed).sample(range(len(rows)), min(len(rows), BATCHES * config.batch_size))
    found: dict[str, Tensor] = {}
    hooks = [layer.register_forward_hook(partial(_record, found, path)) for path, layer in layers.items()]
    try:
        model.train()  # as training does, checkpointing included
        for start in tqdm(range(0, len(drawn), config.batch_size), desc="Gradient", unit="batch", disable=None):
            batch = trainer.data_collator([rows[i] for i in drawn[start : start + config.batch_size]])
            with trainer.accelerator.autocast():
                loss: Any = trainer.compute_loss(model, {key: value.to(model.device) for key, value in batch.items()})
            loss.backward()
            model.zero_grad()
    finally:
        for hook in hooks:
            hook.remove()
    for path, g_OI in found.items():
        layer = layers[path]
        mask_OI = mask_of(layer.get_base_layer()) if layer_kind(layer).masked else None
        a_RI = layer.lora_A[name].weight
        a_RI.data = gradient_rows(g_OI if mask_OI is None else g_OI * mask_OI, a_RI.data)


def _record(found: dict[str, Tensor], path: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """A forward hook: adds ``dY^T X``, the gradient of the weight that the layer multiplies with, when dY is known."""
    x_TI = inputs[0].detach().flatten(0, -2)

    def add(dy: Tensor) -> None:
        g_OI = product(dy.flatten(0, -2).float().mT.contiguous(), x_TI.float().mT.contiguous())
        found[path] = found[path].add_(g_OI) if path in found else g_OI

    if output.requires_grad:  # not so in the first forward of a checkpointed block
        output.register_hook(add)
