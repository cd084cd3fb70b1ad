"""``BlockRepair``: ``--repair block`` where tensors meet modules and files.

A block whose layers are pruned and repaired is trained as a whole (``sparsity/reconstruct.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sqft.config import SparsifyConfig
from sqft.errors import SqftError
from sqft.models.discover import Block
from sqft.models.weights import store
from sqft.sparsity.reconstruct import reconstruct


class BlockRepair:
    """A walk's ``Rebuild``. ``chosen``: names of the weights that are pruned, the others of linear layers stay as they
    are. ``numbers``: held-out errors before and after, epochs, seconds; by block."""

    def __init__(self, config: SparsifyConfig, chosen: Container[str]) -> None:
        self._config, self._chosen = config, chosen
        self.numbers: dict[str, list[float]] = {}

    def change(self, block: Block, forward: Callable[[Any, int], Tensor], targets: list[Tensor]) -> None:
        """Raises SqftError for a block that is not in memory, or text of a single batch."""
        if len(targets) < 2:
            raise SqftError("repair of blocks holds some calibration text out, and has a single batch: use more "
                            "--samples, or a smaller --batch-size")  # fmt: skip
        config = self._config
        start, masks = dict(self._parameters(block)), dict(_masks(block, self._chosen))
        if any(tensor.device.type == "meta" for tensor in start.values()):
            raise SqftError(f"{block.name} is off-loaded: repair of blocks needs it in memory; use --repair layer")
        dtypes, began = {name: tensor.dtype for name, tensor in start.items()}, time.perf_counter()

        device, low = next(iter(start.values())).device.type, config.repair_precision == "bfloat16"

        def output(tensors: Any, batch: int) -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=low, cache_enabled=False):
                return forward({name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}, batch)

        found = reconstruct(output, start, masks, targets, config.repair_epochs, config.repair_rate, config.seed)
        put_parameters(block.module, found.tensors)
        seconds = round(time.perf_counter() - began, 2)
        self.numbers[block.name] = [found.before, found.after, found.epochs, seconds]

    def metrics(self) -> dict[str, Any]:
        """Of all blocks: the mean held-out error before and after, seconds, and each block's numbers."""
        before, after, _, seconds = (list(column) for column in zip(*self.numbers.values(), strict=True))
        return {
            "error_before": sum(before) / len(before), "error_after": sum(after) / len(after),
            "repair_seconds": round(sum(seconds), 2),
            "blocks": {name: {"error_before": n[0], "error_after": n[1], "epochs": round(n[2]), "seconds": n[3]}
                       for name, n in self.numbers.items()},
        }  # fmt: skip

    def _parameters(self, block: Block) -> Iterator[tuple[str, Tensor]]:
        """What is trained: pruned weights, biases, norm gains; not what was excluded from pruning."""
        excluded = {id(p) for name, weight in block.weights.items() if name not in self._chosen
                    for p in weight.module.parameters()}  # fmt: skip
        for name, parameter in block.module.named_parameters():
            if id(parameter) not in excluded and parameter.is_floating_point():
                yield name, parameter.detach()


def _masks(block: Block, chosen: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """bool, in the shapes of the parameters that hold the weights, by the parameters' names in the block."""
    names = {id(parameter): name for name, parameter in block.module.named_parameters()}
    masks: dict[str, Tensor] = {}
    for weight in block.weights.values():
        if weight.name in chosen and (mask_OI := weight.mask) is not None:
            name = names[id(weight.parameter)]
            whole = masks.setdefault(name, torch.ones_like(weight.parameter, dtype=torch.bool))
            weight.part(whole).copy_(mask_OI)
    yield from masks.items()


def put_parameters(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts parameters into a module, by name, in the place of the old ones, which may be mapped files."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        store(owner := module.get_submodule(path), leaf, tensor.to(getattr(owner, leaf).device))
