"""Experts as modules: transformers holds all of a layer's in one parameter [E, O, I], sqft each as a linear layer of
its own, which every stage then prunes, quantizes and adapts as it does any other.

``unstack`` exchanges them in a live model, without copying: the layers' weights are slices. The state dict has the
parameters as transformers knows them, while all are float; packed ones lie one by one.

Shape letters: E experts, T tokens, O output features, I input features, K experts a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sqft.models.weights import put_module

LEAVES = ("gate_up_proj", "down_proj"), ("up_proj", "down_proj")  # gated, and not (Nemotron-H)
A_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")  # configurations' names of K


class Experts(nn.Module):
    """Stands for transformers' experts: ``0.gate_up_proj``, ``0.down_proj``, ``1.gate_up_proj`` and so on, by the names
    that ``leaves`` has.

    ``rules`` is what it stands for, without parameters: how gate and up become one.
    """

    def __init__(self, stacked: Any, leaves: tuple[str, str]) -> None:
        super().__init__()
        self.leaves = leaves
        first = getattr(stacked, leaves[0])
        self.count = first.shape[0]
        self.transposed = bool(getattr(stacked, "is_transposed", first.shape[2] > first.shape[1]))
        for index in range(self.count):
            expert = nn.Module()
            for leaf in leaves:
                expert.add_module(leaf, _linear(stacked, leaf, index, self.transposed))
            self.add_module(str(index), expert)
        for name in list(stacked._parameters):
            delattr(stacked, name)
        self.rules = stacked
        self.register_state_dict_post_hook(_stack)
        self.register_load_state_dict_pre_hook(_split)

    @property
    def routes(self) -> bool:
        """Whether an expert computes its own tokens only, not all of them (Llama 4)."""
        return len(inspect.signature(type(self.rules).forward).parameters) > 2  # itself, x, the index

    def linears(self, leaf: str) -> list[Any]:
        return [self.get_submodule(f"{index}.{leaf}") for index in range(self.count)]

    def _expert(self, index: int, x_TI: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(index))
        if self.leaves[0] == "up_proj":
            return expert.down_proj(self.rules.act_fn(expert.up_proj(x_TI)))
        both = expert.gate_up_proj(x_TI)
        if hasattr(self.rules, "_apply_gate"):
            return expert.down_proj(self.rules._apply_gate(both))
        gate, up = both.chunk(2, dim=-1)
        return expert.down_proj(up * self.rules.act_fn(gate))

    def forward(self, x_TI: Tensor, index_TK: Tensor | None = None, weight_TK: Tensor | None = None) -> Tensor:
        """The weighted sum of each token's experts [T, I]; without an index x is [E T, I], an expert's after the
        other's, and so is the result (Llama 4)."""
        if index_TK is None or weight_TK is None:
            parts = x_TI.view(self.count, -1, x_TI.shape[-1])
            return torch.cat([self._expert(index, part) for index, part in enumerate(parts)])
        y_TI = torch.zeros_like(x_TI)
        with torch.no_grad():
            hit = [int(index) for index in index_TK.unique() if index < self.count]
        for index in hit:
            token, place = torch.where(index_TK == index)
            out = self._expert(index, x_TI[token]) * weight_TK[token, place, None]
            y_TI.index_add_(0, token, out.to(y_TI.dtype))
        return y_TI


def _linear(stacked: Any, leaf: str, index: int, transposed: bool) -> nn.Linear:
    """One expert's layer, whose weight is a slice of the parameter."""
    parameter = getattr(stacked, leaf)
    bias = getattr(stacked, f"{leaf}_bias", None)
    linear = nn.Linear(1, 1, bias=bias is not None, device="meta")
    slice_OI = parameter.detach()[index].mT if transposed else parameter.detach()[index]
    linear.out_features, linear.in_features = slice_OI.shape
    linear.weight = nn.Parameter(slice_OI, requires_grad=parameter.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach()[index], requires_grad=bias.requires_grad)
    return linear


def unstack(model: nn.Module) -> nn.Module:
    """Exchanges every layer's experts in place; the model computes what it did, but for the order of sums."""
    for name, module in list(model.named_modules()):
        for leaves in LEAVES:
            if all(getattr(module._parameters.get(leaf), "ndim", 0) == 3 for leaf in leaves):
                put_module(model, name, Experts(module, leaves).train(module.training))
    return model


def shares_of_tokens(model: Any, names: Iterable[str]) -> dict[str, float]:
    """Of each weight the share of the tokens that reach it: of an expert's K / E, on average, unless the layer gives
    all tokens to all experts (Llama 4); of all others 1."""
    config, shares = model.config.get_text_config(), {}
    taken = next((value for name in A_TOKEN if (value := getattr(config, name, None))), None)
    for name in names:
        path, expert, _ = name.partition(".experts.")
        experts = model.get_submodule(f"{path}.experts") if expert and taken else None
        shares[name] = taken / experts.count if isinstance(experts, Experts) and experts.routes else 1.0
    return shares


def planned(model: nn.Module, tensors: Mapping[str, Tensor], packed: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a state dict will have when the modules ``packed`` are packed: experts of which one is lie one by one."""
    found = dict(tensors)
    for path, module in model.named_modules():
        if isinstance(module, Experts) and any(name.startswith(f"{path}.") for name in packed):
            for key in [key for key in found if key.startswith(f"{path}.")]:
                del found[key]
            found |= {f"{path}.{name}": t.to("meta") for name, t in module.named_parameters()
                      if f"{path}.{name}".rpartition(".")[0] not in packed}  # fmt: skip
    return found


def _stack(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state dict's experts as transformers has them, if all are plain linear layers."""
    assert isinstance(module, Experts)
    for leaf in module.leaves:
        keys = {"weight": leaf, "bias": f"{leaf}_bias"}
        if not all(type(linear) is nn.Linear for each in module.leaves for linear in module.linears(each)):
            return
        for part, name in keys.items():
            slices = [state.pop(key) for i in range(module.count) if (key := f"{prefix}{i}.{leaf}.{part}") in state]
            if slices:
                turned = part == "weight" and module.transposed
                state[prefix + name] = _together([each.mT if turned else each for each in slices])


def _together(slices: list[Tensor]) -> Tensor:
    """[E, ...]; without copying where they still lie in one tensor."""
    first, size = slices[0], slices[0].numel()
    untouched = first.is_contiguous() and all(
        each.untyped_storage()._cdata == first.untyped_storage()._cdata and each.is_contiguous()
        and each.storage_offset() == first.storage_offset() + i * size for i, each in enumerate(slices))  # fmt: skip
    if untouched:
        return first.as_strided((len(slices), *first.shape), (size, *first.stride()), first.storage_offset())
    return torch.stack(slices)


def _split(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Inverse of ``_stack``."""
    assert isinstance(module, Experts)
    for leaf in module.leaves:
        for part, name in (("weight", leaf), ("bias", f"{leaf}_bias")):
            if (whole := state.pop(prefix + name, None)) is not None:
                for i, each in enumerate(whole.mT if part == "weight" and module.transposed else whole):
                    state[f"{prefix}{i}.{leaf}.{part}"] = each
