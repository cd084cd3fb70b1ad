"""``Elastic``: the handle on a live super-adapter: its rank groups, the ranks that are set, sub-adapters, and their
``SearchSpace``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft import get_peft_model_state_dict
from torch import Tensor

from sqft.adapters.groups import RankGroup, Ranks, make_groups
from sqft.adapters.lora import active_rank, set_rank
from sqft.adapters.peft_bridge import active_adapter, adapter_layers
from sqft.errors import UsageError, did_you_mean

RECORDS = "ranks.json"  # in an adapter folder: the choices of every step of training, and the loss under them
_FIXED = "the adapter's rank is fixed: train it with a search space (--search-space 32,24,16)"


@dataclass(frozen=True)
class SearchSpace:
    """Rank groups and, for each, how many weights one rank takes: the sum of I + O over its modules. ``fixed`` is the
    number of adapter weights outside the groups, ``itemsize`` the bytes of a weight."""

    groups: tuple[RankGroup, ...]
    width: dict[str, int]
    fixed: int = 0
    itemsize: int = 4

    @property
    def size(self) -> int:
        """Number of configurations."""
        return math.prod(len(group.choices) for group in self.groups)

    def encode(self, ranks: Ranks) -> tuple[int, ...]:
        """The index of each group's choice, the largest rank first. Raises UsageError for a rank that is no choice."""
        try:
            return tuple(group.choices.index(ranks[group.name]) for group in self.groups)
        except (KeyError, ValueError):
            raise UsageError(f"{ranks} is not a configuration of this space") from None

    def parameters(self, ranks: Ranks) -> int:
        """Weights of the sub-adapter."""
        return self.fixed + sum(self.width[group.name] * ranks[group.name] for group in self.groups)

    def cost(self, ranks: Ranks) -> dict[str, int]:
        """Weights, bytes and FLOPs a token (a multiplication and an addition for each weight) of the sub-adapter."""
        count = self.parameters(ranks)
        return {"parameters": count, "bytes": count * self.itemsize, "flops": 2 * count}


class Elastic:
    """A handle on the adapter that is active when it is made. ``groups``: its rank groups, none if its rank is fixed.
    ``layers``: those that it adapts, by module name. ``own_scaling``: whether scales go by a sub-adapter's own rank."""

    def __init__(self, model: Any) -> None:
        """Raises UsageError if several adapters are active."""
        self.model, self.adapter = model, active_adapter(model)
        layers: dict[str, Any] = dict(adapter_layers(model))
        self.layers = {name: layer for name, layer in layers.items() if self.adapter in layer.lora_A}
        config = model.peft_config[self.adapter]
        space = getattr(config, "search_space", None)
        self.groups = make_groups(list(self.layers), config.rank_groups or (), space) if space else ()
        self.own_scaling = getattr(config, "rank_scaling", "largest") == "own"

    @property
    def space(self) -> SearchSpace:
        """The space of its sub-adapters. Raises UsageError if its rank is fixed."""
        if not self.groups:
            raise UsageError(_FIXED)
        widths = {name: layer.in_features + layer.out_features for name, layer in self.layers.items()}
        grouped = {module for group in self.groups for module in group.modules}
        fixed = sum(layer.r[self.adapter] * widths[name] for name, layer in self.layers.items() if name not in grouped)
        weight = next(iter(self.layers.values())).lora_A[self.adapter].weight
        width = {group.name: sum(widths[module] for module in group.modules) for group in self.groups}
        return SearchSpace(self.groups, width, fixed, weight.element_size())

    def get(self) -> Ranks:
        """The active rank of each group."""
        return {group.name: active_rank(self.layers[group.modules[0]], self.adapter) for group in self.groups}

    def set(self, ranks: Mapping[str, int] | None = None) -> None:
        """Sets the ranks, in place; a group that is not named gets its largest.

        Raises UsageError if the rank is fixed, for an unknown group, a rank that is none of the group's choices, and
        while the adapter is merged: unmerging would subtract another sub-adapter than was added.
        """
        rank_of = self._by_module(ranks or {})
        if rank_of and any(layer.merged for layer in self.layers.values()):
            raise UsageError("the adapter is merged into its base: unmerge it (unmerge_adapter) before setting ranks")
        for module, rank in rank_of.items():
            set_rank(self.layers[module], self.adapter, rank, self.own_scaling)

    @contextlib.contextmanager
    def at(self, ranks: Mapping[str, int] | None = None) -> Iterator[None]:
        """Holds the adapter at some ranks for a while."""
        before = self.get()
        self.set(ranks)
        try:
            yield
        finally:
            self.set(before)

    def slice(self, ranks: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """The sub-adapter's weights alone, as PEFT saves an adapter of these ranks. Its alpha is the super-adapter's
        with ``own_scaling``, else r / R of it (rsLoRA: the root of that). The ranks that are set stay."""
        rank_of, state = self._by_module(ranks or {}), {}
        for key, tensor in get_peft_model_state_dict(self.model, adapter_name=self.adapter).items():
            path, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
            if part.startswith("A."):
                tensor = tensor[: rank_of.get(path)]
            elif part.startswith("B."):
                tensor = tensor[:, : rank_of.get(path)]
            state[key] = tensor.detach().contiguous()
        return state

    def _by_module(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """The rank of each module of a group."""
        groups = {group.name: group for group in self.groups}
        for name, rank in ranks.items():
            if not groups:
                raise UsageError(_FIXED)
            if name not in groups:
                raise UsageError(f"there is no rank group '{name}': {did_you_mean(name, groups)}")
            if rank not in groups[name].choices:
                choices = ", ".join(map(str, groups[name].choices))
                raise UsageError(f"rank {rank} is not a choice of group '{name}': {choices}")
        return {module: ranks.get(group.name, group.choices[0]) for group in self.groups for module in group.modules}


def set_ranks(model: Any, ranks: Mapping[str, int] | None = None) -> None:
    """``Elastic(model).set(ranks)``."""
    Elastic(model).set(ranks)


def get_ranks(model: Any) -> Ranks:
    """``Elastic(model).get()``."""
    return Elastic(model).get()
