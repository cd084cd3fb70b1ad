"""The rank groups of a live super-adapter: which there are, which ranks are active, and setting them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqft.adapters.lora import active_rank
from sqft.adapters.peft_bridge import active_adapter, adapter_layers
from sqft.elastic.groups import RankGroup, Ranks, make_groups
from sqft.errors import UsageError, did_you_mean

RECORDS = "ranks.json"  # in an adapter folder: the choices of every step of training, and the loss under them


def rank_groups(model: Any) -> tuple[RankGroup, ...]:
    """The groups of the active adapter; none if its rank is fixed."""
    config = model.peft_config[active_adapter(model)]
    space: Sequence[int] = getattr(config, "search_space", None) or ()
    return make_groups(list(adapter_layers(model)), config.rank_groups or (), space) if space else ()


def set_ranks(model: Any, ranks: Mapping[str, int] | None = None) -> None:
    """Sets the ranks of a super-adapter, in place; a group that is not named gets its largest.

    Raises UsageError if the rank is fixed, for an unknown group, or a rank that is none of the group's choices.
    """
    groups = {group.name: group for group in rank_groups(model)}
    for name, rank in (ranks or {}).items():
        if not groups:
            raise UsageError("the adapter's rank is fixed: train it with a search space (--search-space 32,24,16)")
        if name not in groups:
            raise UsageError(f"there is no rank group '{name}': {did_you_mean(name, groups)}")
        if rank not in groups[name].choices:
            choices = ", ".join(map(str, groups[name].choices))
            raise UsageError(f"rank {rank} is not a choice of group '{name}': {choices}")
    apply_ranks(adapter_layers(model), active_adapter(model), groups.values(), ranks or {})


def apply_ranks(layers: Mapping[str, Any], adapter: str, groups: Iterable[RankGroup], ranks: Mapping[str, int]) -> None:
    """``set_ranks`` of layers that are at hand (by module name), without its checks."""
    for group in groups:
        rank = ranks.get(group.name, group.choices[0])
        for module in group.modules:
            layers[module].sqft_ranks = {**getattr(layers[module], "sqft_ranks", {}), adapter: rank}


def get_ranks(model: Any) -> Ranks:
    """The active rank of each group."""
    layers, adapter = adapter_layers(model), active_adapter(model)
    return {group.name: active_rank(layers[group.modules[0]], adapter) for group in rank_groups(model)}
