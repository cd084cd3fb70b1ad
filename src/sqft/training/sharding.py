"""FSDP2: every process holds a share of each weight, of its integers, mask and float base too, and gathers a block's
when it is computed.

What is gathered are the bits that were divided: no mixed-precision policy casts them (the scales of a grid would move,
and A and B in bfloat16 would train another model than merging writes); autocast, as without shares, makes products low.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sqft.adapters.quant_aware import FLOAT_BASE
from sqft.models.weights import MASK, full, local
from sqft.processes import count
from sqft.registry import FAMILIES

_FROZEN = ("qweight", "qzeros", "scales", "g_idx", "fractions", FLOAT_BASE, MASK)  # buffers, of which FSDP2 takes none


def shard(model: Any, device: torch.device) -> None:
    """Divides a ``PeftModel`` among the processes, block by block, and moves its share to the device."""
    mesh, causal = init_device_mesh(device.type, (count(),)), model.get_base_model()
    for block in causal.get_submodule(FAMILIES[causal.config.model_type].blocks).children():
        for module in block.modules():
            for name in [name for name, buffer in module._buffers.items() if buffer is not None and name in _FROZEN]:
                tensor = module._buffers.pop(name)
                module.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether its weights are divided among processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def held_bytes(model: nn.Module) -> int:
    """Of the weights that this process holds."""
    return sum(local(tensor).nbytes for tensor in (*model.parameters(), *model.buffers()))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, whole and on the CPU, by its name in the state dict. All processes have to ask for it."""
    return {name: full(tensor).cpu() for name, tensor in model.state_dict().items()
            if ".lora_" in name or ".modules_to_save." in name}  # fmt: skip


def gather(model: nn.Module) -> None:
    """Puts whole adapters into a sharded model, by all processes, so that it can be saved. It computes no more."""
    for name, tensor in adapter_state(model).items():
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        container = module if isinstance(module, nn.ParameterDict) else module._parameters
        container[leaf] = nn.Parameter(tensor)


def whole_states(optimizer: Any) -> None:
    """Lets an optimizer of shares write, and read, the state of whole parameters: any number of processes goes on."""

    def gathered(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        found = {i: {name: full(value) for name, value in entry.items()} for i, entry in state["state"].items()}
        return {**state, "state": found}

    def divided(mine: Any, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in mine.param_groups for parameter in group["params"]]
        found = {i: {name: _like(parameters[i], value) for name, value in entry.items()}
                 for i, entry in state["state"].items()}  # fmt: skip
        return {**state, "state": found}

    optimizer.register_state_dict_post_hook(gathered)
    optimizer.register_load_state_dict_pre_hook(divided)


def _like(parameter: Any, value: Any) -> Any:
    """A whole tensor divided as a parameter is; what has another shape (a count of steps) as it is."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
