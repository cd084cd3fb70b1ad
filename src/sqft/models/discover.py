"""From a live model to its ``Architecture``: the decoder blocks and their linear weights, by the table of families."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from sqft.errors import SqftError, UsageError, did_you_mean
from sqft.models.tables import BY_TYPE, Family


@dataclass(frozen=True)
class Block:
    """One decoder block: its path in the model, the module, and its linear modules by full name, in order.

    A linear module is a ``torch.nn.Linear`` or, in a quantized model, a ``QuantLinear``.
    """

    name: str
    module: nn.Module
    linears: dict[str, Any]

    def replace(self, name: str, module: nn.Module) -> None:
        """Puts another linear module in the place of ``name`` (a full name), in the model too."""
        parent, _, leaf = name.removeprefix(self.name + ".").rpartition(".")
        setattr(self.module.get_submodule(parent), leaf, module)
        self.linears[name] = module


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, dense or packed."""
    return isinstance(module, nn.Linear) or hasattr(module, "qweight")


def weight_of(module: Any) -> Tensor:
    """The weight [O, I] of a linear layer, de-quantized (float32) where it is packed; without gradient."""
    return module.dequantize() if hasattr(module, "qweight") else module.weight.detach()


@dataclass(frozen=True)
class Architecture:
    """Where a model keeps what sqft works on. ``backbone`` runs embeddings and blocks, without the head."""

    family: Family
    backbone: nn.Module
    blocks: tuple[Block, ...]

    def linears(self) -> Iterator[tuple[str, Any]]:
        """All linear modules of all blocks, by full name, in execution order."""
        for block in self.blocks:
            yield from block.linears.items()

    def names(self) -> list[str]:
        return [name for name, _ in self.linears()]


def describe(model: nn.Module) -> Architecture:
    """Finds the blocks of a ``transformers`` causal language model and checks them against its family's row.

    Raises SqftError if the family is unknown, or if the live model differs from the table: a block path that does not
    exist, a listed module that is missing, or a linear module that the table does not list.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise SqftError(f"{type(model).__name__} is not a transformers model: it has no config.model_type")
    if model_type not in BY_TYPE:
        raise SqftError(
            f"model family '{model_type}' is not supported yet ({did_you_mean(model_type, BY_TYPE)}); "
            "docs/add-a-model.md shows how to add its row"
        )
    if getattr(model, "peft_config", None):
        raise SqftError("this model carries adapters: merge or unload them first")
    family = BY_TYPE[model_type]
    try:
        modules = model.get_submodule(family.blocks)
    except AttributeError:
        raise SqftError(
            f"{type(model).__name__} has no '{family.blocks}': load it as a causal language model"
        ) from None
    assert isinstance(modules, nn.ModuleList)
    blocks = tuple(_describe_block(family, f"{family.blocks}.{i}", module) for i, module in enumerate(modules))
    backbone = getattr(model, str(model.base_model_prefix))
    return Architecture(family, backbone, blocks)


def _describe_block(family: Family, path: str, module: nn.Module) -> Block:
    found = {name: child for name, child in module.named_modules() if is_linear(child)}
    missing = [name for name in family.linears if name not in found]
    unlisted = [name for name in found if name not in family.linears]
    if missing or unlisted:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"also has {', '.join(unlisted)}"] * bool(unlisted)
        raise SqftError(
            f"{path} ({type(module).__name__}) differs from the table of family "
            f"'{family.model_types[0]}': it {' and '.join(parts)}; see docs/add-a-model.md"
        )
    return Block(path, module, {f"{path}.{name}": found[name] for name in family.linears})


def match_modules(patterns: Sequence[str], names: Sequence[str], what: str) -> dict[str, list[str]]:
    """Which full module names each shell-style pattern matches. A pattern that matches nothing is a UsageError."""
    matched = {}
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern) or name.endswith("." + pattern)]
        if not hits:
            leaves = {name.rsplit(".", 1)[-1] for name in names}
            raise UsageError(
                f"{what} '{pattern}' matches no module: {did_you_mean(pattern.rsplit('.', 1)[-1], leaves)} "
                f"(full names look like {names[0]})"
            )
        matched[pattern] = hits
    return matched


def resolve_targets(architecture: Architecture, targets: Sequence[str]) -> list[str]:
    """Full names of the modules to adapt; without targets, the family's. A name that matches nothing is an error."""
    names = architecture.names()
    for target in targets:
        fused = architecture.family.fused.get(target)
        if fused and not any(name.endswith("." + target) for name in names):
            raise UsageError(
                f"this family ({architecture.family.model_types[0]}) has no '{target}': its weights are in '{fused}', "
                "ask for that"
            )
    matched = match_modules(list(targets) or list(architecture.family.targets), names, "target module")
    hits = {name for group in matched.values() for name in group}
    return [name for name in names if name in hits]
