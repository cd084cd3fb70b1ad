"""A row of the table of families for a model type that it does not have, from the live model: ``--infer``.

Blocks are the repeated modules that hold most linear weights; what all of them have are ``linears``, what some have
together is a part of ``either``. What routes, or gates a whole expert, stays. The row is then checked as any other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from torch import nn

from sqft.errors import SqftError
from sqft.models.tables import Family
from sqft.models.weights import Weight, is_linear

ROUTES = ("router", "gate", "shared_expert_gate")
USUAL = re.compile(r"q_|k_|v_|qkv|query|key|value|up|down|fc|h_to|w1|w2|w3|c_attn|c_fc|c_proj|in_proj")


_allowed = False


def allow(on: bool = True) -> None:
    """Whether model types that the table does not have are inferred, in this process."""
    global _allowed
    _allowed = on


def allowed() -> bool:
    return _allowed


def infer(model: nn.Module) -> Family:
    """The row. Raises SqftError if no module is repeated that holds linear layers."""
    best, size = "", 0
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            found = sum(math.prod(Weight("", child).shape) for child in module.modules() if is_linear(child))
            if found > size:
                best, size = path, found
    if not best:
        raise SqftError(f"{type(model).__name__} has no repeated blocks with linear layers: its row cannot be inferred")
    blocks = [
        {name: m for name, m in block.named_modules() if is_linear(m)} for block in model.get_submodule(best).children()
    ]
    where = _where(blocks)
    kept = tuple(name for name in where if not set(ROUTES).isdisjoint(name.split(".")))
    whole = tuple(range(len(blocks)))
    parts: dict[tuple[int, ...], list[str]] = {}
    for name, places in where.items():
        if name not in kept:
            parts.setdefault(places, []).append(name)
    linears = tuple(parts.pop(whole, []))
    leaves = dict.fromkeys(name.rpartition(".")[2] for names in (linears, *parts.values()) for name in names)
    targets = tuple(leaf for leaf in leaves if USUAL.search(leaf)) or tuple(leaves)
    return Family("inferred", best, linears, targets, either=tuple(map(tuple, parts.values())), kept=kept)


def _where(blocks: Sequence[Mapping[str, nn.Module]]) -> dict[str, tuple[int, ...]]:
    """Of each linear layer, experts' as one name, the numbers of the blocks that have it."""
    found: dict[str, dict[int, None]] = {}
    for index, block in enumerate(blocks):
        for name in block:
            found.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.*.", name), {})[index] = None
    return {name: tuple(places) for name, places in found.items()}
