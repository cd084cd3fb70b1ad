"""From a live model to its ``Architecture``: the decoder blocks and their linear weights, by the table of families."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from sqft.errors import SqftError, UsageError, did_you_mean
from sqft.models.bounds import check_decoder
from sqft.models.experts import unstack
from sqft.models.infer import allowed, infer
from sqft.models.tables import Family
from sqft.models.weights import Weight, is_linear
from sqft.registry import FAMILIES

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Block:
    """One decoder block: its path in the model, the module, and its linear weights by full name, in order."""

    name: str
    module: nn.Module
    weights: dict[str, Weight]


@dataclass(frozen=True)
class Architecture:
    """Where a model keeps what sqft works on. ``backbone`` runs embeddings and blocks, without the head; ``whole`` are
    the paths of blocks that text does not run, and that stay as they are."""

    family: Family
    backbone: nn.Module
    blocks: tuple[Block, ...]
    whole: tuple[str, ...] = ()

    def weights(self) -> Iterator[Weight]:
        """The linear weights of all blocks, in execution order."""
        for block in self.blocks:
            yield from block.weights.values()

    def names(self) -> list[str]:
        return [weight.name for weight in self.weights()]


def describe(model: nn.Module) -> Architecture:
    """Finds the blocks of a ``transformers`` causal language model and checks them against its family's row.

    Raises SqftError if the family is unknown, or if the live model differs from the table: a block path that does not
    exist, a listed module that is missing, or a linear module that the table does not list.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise SqftError(f"{type(model).__name__} is not a transformers model: it has no config.model_type")
    check_decoder(model.config)
    if model_type not in FAMILIES and not allowed():
        from transformers import CONFIG_MAPPING

        hint = "" if model_type in CONFIG_MAPPING else f" ({did_you_mean(model_type, FAMILIES)})"
        raise SqftError(f"model family '{model_type}' is not supported yet{hint}: --infer takes its repeated "
                        "blocks and the linear layers in them; docs/extend.md shows how to add a row")  # fmt: skip
    if getattr(model, "peft_config", None):
        raise SqftError("this model carries adapters: merge or unload them first")
    unstack(model)
    family: Family = FAMILIES[model_type] if model_type in FAMILIES else infer(model)
    try:
        modules = model.get_submodule(family.blocks)
    except AttributeError:
        raise SqftError(
            f"{type(model).__name__} has no '{family.blocks}': load it as a causal language model"
        ) from None
    assert isinstance(modules, nn.ModuleList)
    paths = {f"{family.blocks}.{i}": module for i, module in enumerate(modules)}
    whole = [path for path, module in paths.items() if hasattr(module, family.cross_attention or " ")]
    blocks = tuple(_describe_block(family, path, module) for path, module in paths.items() if path not in whole)
    backbone = getattr(model, str(model.base_model_prefix), None)
    if not isinstance(backbone, nn.Module):
        backbone = model.get_submodule(family.blocks.rpartition(".")[0])
    return Architecture(family, backbone, blocks, tuple(whole))


def _describe_block(family: Family, path: str, module: nn.Module) -> Block:
    found = {name: child for name, child in module.named_modules() if is_linear(child) and name not in family.kept}
    parts = [[one for name in part for one in _named(name, found)] for part in (family.linears, *family.either)]
    parts = [part for i, part in enumerate(parts) if i == 0 or any(name in found for name in part)]
    listed = [name for part in parts for name in part]
    missing = [name for name in listed if name not in found]
    unlisted = [name for name in found if name not in listed] + _stacked(module)
    if missing or unlisted or not listed:
        wrong = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"also has {', '.join(unlisted)}"] * bool(unlisted)
        raise SqftError(
            f"{path} ({type(module).__name__}) differs from the table of family "
            f"'{family.name}': it {' and '.join(wrong) or 'has none of its layers'}; see docs/extend.md"
        )
    weights = (Weight(f"{path}.{name}", found[name], module.get_submodule(name.rpartition(".")[0])) for name in listed)
    return Block(path, module, {weight.name: weight for weight in weights})


def _named(name: str, found: Iterable[str]) -> list[str]:
    """The modules that a name of the table stands for: of experts one for each."""
    if "*" not in name:
        return [name]
    return [other for other in found if fnmatchcase(other, name)]


def _stacked(module: nn.Module) -> list[str]:
    """Parameters that hold several weights, as experts do; no convolution."""
    modules = ((name, m) for name, m in module.named_modules() if not isinstance(m, CONVOLUTIONS))
    return [f"{name}.{leaf}".lstrip(".") for name, m in modules
            for leaf, parameter in m.named_parameters(recurse=False) if parameter.ndim > 2]  # fmt: skip


def input_device(model: Any) -> torch.device:
    """Where a model's inputs go: to its input embedding, since it may lie on several devices (``device_map``)."""
    return next(model.get_input_embeddings().parameters()).device


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of a model, those of the blocks and others, by name: modules with a weight of one dimension."""
    return {name: module for name, module in model.named_modules()
            if isinstance(weight := module._parameters.get("weight"), torch.Tensor) and weight.dim() == 1}  # fmt: skip


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
    """Full names of the modules to adapt; without targets, the family's; of 'all', PEFT's 'all-linear', every linear
    weight of the blocks. A name that matches nothing is an error."""
    banned = tuple(f".{name}" for name in architecture.family.banned)
    names = [name for name in architecture.names() if not banned or not name.endswith(banned)]
    if len(targets) == 1 and targets[0].lower() in ("all", "all-linear"):
        return names
    for target in targets:
        fused = architecture.family.fused.get(target)
        if fused and not any(name.endswith("." + target) for name in names):
            raise UsageError(
                f"this family ({architecture.family.name}) has no '{target}': its weights are in '{fused}', "
                "ask for that"
            )
    usual = [target for target in architecture.family.targets if any(name.endswith(f".{target}") for name in names)]
    matched = match_modules(list(targets) or usual, names, "target module")
    hits = {name for group in matched.values() for name in group}
    return [name for name in names if name in hits]
