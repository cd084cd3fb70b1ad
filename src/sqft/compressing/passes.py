"""What one walk over the blocks does to each of them: ``Prune`` and ``Quantize``.

A pass is made from a stage's config, is planned on a model (which finds the options that do not fit it) and then goes
through the model's blocks. Methods see tensors alone: this is where they meet modules.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sqft.calibration.statistics import Gradient, Hessian, Paired, gradients, is_paired
from sqft.calibration.walker import walk
from sqft.compressing.kept import Kept
from sqft.compressing.rebuild import BlockRepair, put_parameters
from sqft.compressing.tokens import calibration_tokens
from sqft.config import QuantizeConfig, SparsifyConfig
from sqft.errors import SqftError, UsageError
from sqft.formats.checkpoint import plan_tensors
from sqft.kernels.dispatch import pick_device
from sqft.models.discover import Architecture, Block, match_modules
from sqft.models.embeddings import planned_dtypes
from sqft.models.types import Tokenizer
from sqft.models.weights import Weight
from sqft.processes import count, divided
from sqft.quantization.grid import GROUP_SIZES, Grid, GridSpec
from sqft.quantization.linear import QuantLinear
from sqft.quantization.method import Quantized, Quantizer
from sqft.registry import QUANTIZERS, SPARSIFIERS, Registry
from sqft.sparsity.given import Given, given_masks
from sqft.sparsity.masks import ZeroCounts, count_zeros
from sqft.sparsity.method import Sparsifier
from sqft.sparsity.pattern import Pattern
from sqft.sparsity.repair import repair

MASK, NUMBERS, UNREACHED = "mask:", "numbers", "unreached"  # in a kept block's file, beside names of tensors


class Pass(ABC):
    """One walk's work. ``plan``, then ``prepare``, then ``blocks``; ``metrics`` afterwards."""

    stage: str
    title: str
    sequential = False
    simplest: str  # the method of an expert that no calibration token reached
    format = "auto"  # of a checkpoint
    embeddings = "keep"  # what embeddings and head are rounded to when all is done

    def __init__(self, config: Any, methods: Registry, kind: type) -> None:
        self.config, self.method = config, methods[config.method]
        self._simple, self._unreached = methods[self.simplest], 0
        if not isinstance(self.method, kind):
            decorator = f"@{kind.__name__.lower()}"
            raise SqftError(f"{methods.kind} '{config.method}' is not decorated: it has to be a sqft {decorator}")
        self.repairs = config.repair != "none"
        self.paired = self.repairs or is_paired(self.method.needs)  # the un-changed model's inputs have to be known too
        self._device = pick_device(config.device)
        self.layers: dict[str, QuantLinear] = {}  # empty ones, for the modules that will be packed
        self._chosen: Mapping[str, Any] = {}
        self._done: set[str] = set()  # weights
        self._restored: set[str] = set()  # blocks
        self._tokens: Tensor | None = None
        self._gradients: dict[str, Gradient] = {}
        self.rebuild: BlockRepair | None = None
        self.kept = Kept(None)

    @abstractmethod
    def plan(self, architecture: Architecture) -> None:
        """Finds the weights to change. Raises UsageError for options that do not fit the model."""

    @abstractmethod
    def change(self, block: Block, statistics: Mapping[str, Any]) -> None:
        """Changes a block's chosen weights, or those of them that there are statistics of."""

    @abstractmethod
    def made(self, block: Block) -> dict[str, Tensor]:
        """What the pass made of a block, which is not finished yet."""

    @abstractmethod
    def put(self, block: Block, tensors: dict[str, Tensor]) -> None:
        """Makes a block what it was when ``made`` gave these tensors."""

    @abstractmethod
    def finish(self, block: Block) -> None:
        """Is called with each block when the walk needs it no more."""

    @abstractmethod
    def metrics(self, model: nn.Module) -> dict[str, Any]:
        """The numbers of all blocks."""

    def prepare(self, model: nn.Module, architecture: Architecture, tokens: Tensor | None,
                tokenizer: Tokenizer | None) -> None:  # fmt: skip
        """Takes the calibration tokens (int64 [N, T], or those of the config), and what has to be known of the whole
        model. Nothing for a method without calibration."""
        if self.method.needs is None and not self.paired:
            return
        experts = any(".experts." in name for name in architecture.names())
        if count() > 1 and (experts or self.rebuild is not None):
            what = "a model with experts" if experts else f"repair {self.config.repair}"
            raise UsageError(f"the calibration of {what} is not divided among processes: run this stage in one, then "
                             "the rest of the recipe in several")  # fmt: skip
        if self.paired and experts:
            what = f"repair {self.config.repair}" if self.repairs else self.config.method
            raise UsageError(f"the model has experts, and {what} compares each layer's inputs with the un-changed "
                             "model's, of which other tokens go to them: leave it out")  # fmt: skip
        if tokens is None:
            if tokenizer is None:
                raise UsageError("calibration text needs a tokenizer: pass tokenizer=..., or token ids as calibration")
            tokens = calibration_tokens(tokenizer, self.config)
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise UsageError(f"calibration has to be int64 [N, T] token ids, not {tokens.dtype} {tuple(tokens.shape)}")
        self._tokens = tokens
        if self.method.needs is Gradient:
            if self.repairs:
                raise UsageError(
                    f"repair {self.config.repair} does not go with the method {self.config.method}: it needs gradients"
                )
            weights = [weight for weight in architecture.weights() if weight.name in self._chosen]
            self._gradients, self._tokens = gradients(model, weights, tokens), None

    def blocks(self, architecture: Architecture) -> Iterator[Block]:
        """Changes block after block; yields each when it is finished."""
        needs, size = self.method.needs, self.config.batch_size
        statistic = functools.partial(Paired, needs) if self.repairs else needs
        for block in walk(architecture, self._tokens, size, statistic, self.change, self.title, self._device,
                          self.sequential, needs is Hessian or self.paired, self.paired, self.rebuild,
                          self, self.config.spill):  # fmt: skip
            unseen = [name for name in block.weights if name in self._chosen and name not in self._done]
            if unseen:
                self._without_tokens(block, unseen)
            if self._tokens is not None and block.name not in self._restored:
                self.kept.write(block.name, {**self.made(block), UNREACHED: torch.tensor(len(unseen))})
            self.finish(block)
            yield block

    def known(self, block: Block) -> bool:
        """Whether the block was finished before an interruption."""
        return self.kept.has(block.name)

    def restore(self, block: Block) -> None:
        """Puts into a block what ``made`` gave of it."""
        tensors = self.kept.read(block.name)
        self._unreached += int(tensors.pop(UNREACHED))
        self._restored.add(block.name)
        self._done.update(block.weights)
        self.put(block, tensors)

    def _without_tokens(self, block: Block, names: Sequence[str]) -> None:
        """Changes experts that no calibration token reached, by the simplest method. Raises SqftError for others."""
        if other := next((name for name in names if ".experts." not in name), None):
            raise SqftError(f"no calibration token reached {other}: take more samples, or exclude it")
        usual, self.method = self.method, self._simple
        self.change(block, dict.fromkeys(names))
        self.method, self._unreached = usual, self._unreached + len(names)

    def _groups(self, block: Block, statistics: Mapping[str, Any]) -> Iterator[tuple[list[Weight], list[Tensor], Any]]:
        """The weights to change now, those that share an input together, the statistic's value for the method, and what
        ``repair`` needs, if it is asked for."""
        unwalked: Mapping[str, Any] = {name: self._gradients.get(name) for name in block.weights}
        known = unwalked if self._tokens is None else statistics
        groups: dict[int | str, list[Weight]] = {}
        for name, statistic in known.items():
            if name in self._chosen:
                groups.setdefault(name if statistic is None else id(statistic), []).append(block.weights[name])
        for weights in groups.values():
            statistic = known[weights[0].name]
            value = None if statistic is None else statistic.value()
            products = statistic.products() if self.repairs and statistic is not None else None
            yield weights, [] if value is None else [value], products
            self._done.update(weight.name for weight in weights)


def _chosen_weights(architecture: Architecture, config: Any, verb: str) -> dict[str, Weight]:
    """Those that are not excluded, by name. Raises UsageError if that is none, or one is packed."""
    names = architecture.names()
    excluded = {name for hits in match_modules(config.exclude, names, "exclude").values() for name in hits}
    chosen = {weight.name: weight for weight in architecture.weights() if weight.name not in excluded}
    if not chosen:
        raise UsageError(f"every module is excluded: nothing is left to {verb}")
    packed = [name for name, weight in chosen.items() if weight.packed]
    if packed:
        raise UsageError(f"{packed[0]} is packed already: {verb} the float model")
    return chosen


class Prune(Pass):
    """Zeroes weights by a pattern or by given masks and remembers the masks. What was pruned before stays pruned."""

    stage, simplest = "sparsify", "magnitude"

    def __init__(self, config: SparsifyConfig) -> None:
        super().__init__(config, SPARSIFIERS, Sparsifier)
        if config.mask:  # there is nothing to choose, so nothing to know of the inputs
            self.method, self.paired = self._simple, self.repairs
        self.title = f"Sparsify ({config.mask or config.method})"
        self.sequential = self.paired
        self._counts: dict[str, tuple[int, int]] = {}

    def plan(self, architecture: Architecture) -> None:
        self._chosen = patterns(architecture, self.config)
        if self.config.repair == "block":
            self.rebuild = BlockRepair(self.config, self._chosen.keys())

    def change(self, block: Block, statistics: Mapping[str, Any]) -> None:
        chosen = [(weight, *known) for weights, *known in self._groups(block, statistics) for weight in weights]
        jobs = [functools.partial(self._pruned, *each) for each in chosen]
        for (weight, *_), found in zip(chosen, divided(jobs), strict=True):
            weight.write(found["weight"])
            weight.set_mask(found["mask"])

    def _pruned(self, weight: Weight, value: list[Tensor], products: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
        """What a weight and its mask become."""
        w_OI = _beside(weight.read(), *value, products)
        mask_OI, changed_OI = self.method(w_OI, *value, self._chosen[weight.name])
        if (earlier := weight.mask) is not None:
            mask_OI = mask_OI & earlier.to(mask_OI.device)
        pruned_OI = torch.where(mask_OI, w_OI if changed_OI is None else changed_OI, 0)
        return {"weight": repair(pruned_OI, w_OI, mask_OI, *products) if products else pruned_OI, "mask": mask_OI}

    def made(self, block: Block) -> dict[str, Tensor]:
        masks = {MASK + name: weight.packed_mask for name, weight in block.weights.items()}
        numbers = {NUMBERS: torch.tensor(self.rebuild.numbers[block.name], dtype=torch.float64)} if self.rebuild else {}
        return {**dict(block.module.named_parameters()), **numbers,
                **{name: mask for name, mask in masks.items() if mask is not None}}  # fmt: skip

    def put(self, block: Block, tensors: dict[str, Tensor]) -> None:
        if self.rebuild:
            self.rebuild.numbers[block.name] = tensors.pop(NUMBERS).tolist()
        for name, weight in block.weights.items():
            if (mask := tensors.pop(MASK + name, None)) is not None:
                weight.set_packed_mask(mask)
        put_parameters(block.module, tensors)

    def finish(self, block: Block) -> None:
        for name, weight in block.weights.items():
            self._counts[name] = count_zeros(w_OI := weight.read()), w_OI.numel()

    def metrics(self, model: nn.Module) -> dict[str, Any]:
        zeros, weights = (sum(values) for values in zip(*self._counts.values(), strict=True))
        return {
            "sparsity": zeros / weights, "zeros": zeros, "weights": weights,
            "parameters": sum(p.numel() for p in model.parameters()),
            **({"unreached": self._unreached} if self._unreached else {}),
            "by_module": {name: round(zero / count, 6) for name, (zero, count) in self._counts.items()},
            **(self.rebuild.metrics() if self.rebuild else {}),
        }  # fmt: skip


def patterns(architecture: Architecture, config: SparsifyConfig) -> Mapping[str, Pattern | Given]:
    """How much of each weight is kept, by full name; excluded ones are absent. Raises UsageError for a module pattern
    that matches nothing, an N:M that does not divide, a ratio that prunes nothing, or masks that do not fit."""
    chosen = _chosen_weights(architecture, config, "prune")
    if config.mask:
        return given_masks(config.mask, chosen.values())
    pattern = Pattern.parse(config.pattern) if config.pattern else Pattern(config.sparsity)
    found = dict.fromkeys(chosen, pattern)
    for key, hits in match_modules(list(config.overrides), architecture.names(), "override").items():
        found.update({name: Pattern(config.overrides[key]) for name in hits if name in chosen})
    for name, weight in chosen.items():
        found[name].check(name, weight.shape)
    return found


class Quantize(Pass):
    """Puts ``QuantLinear`` layers in the place of linear ones. A pruned weight stays exactly zero."""

    stage, simplest = "quantize", "rtn"

    def __init__(self, config: QuantizeConfig) -> None:
        super().__init__(config, QUANTIZERS, Quantizer)
        self.title = f"Quantize ({config.method}, {config.bits} bits)"
        self.sequential, self.format = config.true_sequential or self.paired, config.format
        if config.clip == "hessian" and self.method.needs is None:
            raise UsageError(f"clip hessian does not go with method {config.method}, which knows no inputs: use mse")
        self.embeddings = config.embeddings
        self._spec = GridSpec(config.bits, -1, config.symmetric, config.clip, config.scale_bits, config.min_zero)
        self._packed: dict[str, QuantLinear] = {}
        self._counts, self._bits = ZeroCounts(), 0

    def plan(self, architecture: Architecture) -> None:
        self._chosen = self.layers = quantized_layers(architecture, self.config)
        self._spec = replace(self._spec, group_size=next(iter(self.layers.values())).stored_group_size)

    def change(self, block: Block, statistics: Mapping[str, Any]) -> None:
        groups = list(self._groups(block, statistics))
        jobs = [functools.partial(self._together, *each) for each in groups]
        for (weights, *_), found in zip(groups, divided(jobs), strict=True):
            rows = [weight.shape[0] for weight in weights]
            parts = {name: found[name].split(rows) for name in found}
            for i, weight in enumerate(weights):
                grid = Grid(self._spec.bits, parts["scale"][i], parts["zero"][i])
                result = Quantized(parts["q"][i], grid, parts["fractions"][i] if "fractions" in parts else None)
                layer = QuantLinear.from_quantized(result, self._spec.group_size, self._spec.symmetric, weight.bias)
                if (mask_OI := weight.mask) is not None:
                    Weight(weight.name, layer).set_mask(mask_OI)
                self._hold(weight, layer)

    def _hold(self, weight: Weight, layer: QuantLinear) -> None:
        """Until the block is finished it computes with the float form of its integers, which gives the same."""
        self._packed[weight.name] = layer
        self._counts.add(Weight(weight.name, layer))
        self._bits += 8 * sum(t.nbytes for t in (layer.qweight, layer.qzeros, layer.scales))
        weight.write(Quantized(layer.integers(), layer.grid()).weight())

    def made(self, block: Block) -> dict[str, Tensor]:
        return {f"{name}:{kind}": tensor for name, layer in self._packed.items()
                for kind, tensor in layer.named_buffers()}  # fmt: skip

    def put(self, block: Block, tensors: dict[str, Tensor]) -> None:
        for name, weight in block.weights.items():
            mine = {key.rpartition(":")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}:")}
            if mine:
                self._hold(weight, self.layers[name].filled(mine, weight.bias))

    def _together(self, weights: Sequence[Weight], value: list[Tensor],
                  products: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:  # fmt: skip
        """Quantizes weights that share an input (q, k and v) as one: rows do not depend on each other."""
        masks = [weight.mask for weight in weights]
        w_OI = _beside(torch.cat([weight.read() for weight in weights]), *value, products)
        whole = (torch.ones(weight.shape, dtype=torch.bool) if mask is None else mask
                 for weight, mask in zip(weights, masks, strict=True))  # fmt: skip
        mask_OI = None if all(m is None for m in masks) else torch.cat([m.to(w_OI.device) for m in whole])
        if products is not None:
            w_OI = repair(w_OI, w_OI, mask_OI, *products)
        q_OI, grid, f_OI = self.method(w_OI, *value, mask_OI, self._spec, act_order=self.config.act_order)
        found = {"q": q_OI, "scale": grid.scale_OG, "zero": grid.zero_OG}
        if not self.config.keep_fractions:
            return found
        if f_OI is None:
            raise UsageError(f"method {self.config.method} does not tell fractions: leave keep_fractions out")
        # Of a pruned weight there is nothing to start from.
        return {**found, "fractions": f_OI if mask_OI is None else f_OI * mask_OI}

    def finish(self, block: Block) -> None:
        for name, weight in block.weights.items():
            if name in self._packed:
                weight.replace(self._packed.pop(name).to(weight.device))

    def metrics(self, model: nn.Module) -> dict[str, Any]:
        weights = self._counts.weights
        return {"bits": self.config.bits, "bits_per_weight": self._bits / weights, **self._counts.metrics(),
                **({"unreached": self._unreached} if self._unreached else {}),
                "parameters": weights + sum(p.numel() for p in model.parameters())}  # fmt: skip


def quantized_layers(architecture: Architecture, config: QuantizeConfig) -> dict[str, QuantLinear]:
    """An empty packed layer (on ``meta``) for each module to quantize, by full name. Raises UsageError for a pattern
    that matches nothing, or a group size, or a width at these bits, that does not fit."""
    chosen = _chosen_weights(architecture, config, "quantize")
    for name, weight in chosen.items():
        if any(width * config.bits % 32 for width in weight.shape):  # then no group size fits
            raise UsageError(f"{name} is {list(weight.shape)}: at {config.bits} bits both have to fill 32-bit words; "
                             "exclude the module")  # fmt: skip
    fitting = [s for s in GROUP_SIZES if s == -1 or all(w.shape[1] % s == 0 for w in chosen.values())]
    layers = {}
    size = config.group_size or next(s for s in (128, 64, 32, -1) if s in fitting)
    for name, weight in chosen.items():
        outputs, inputs = weight.shape
        if size != -1 and inputs % size:
            sizes = ", ".join(map(str, fitting))
            raise UsageError(f"group size {size} does not divide the {inputs} inputs of "
                             f"{name}: these fit the whole model: {sizes}; or exclude the module")  # fmt: skip
        layers[name] = QuantLinear(inputs, outputs, config.bits, size, bias=weight.bias is not None,
                                   device="meta", dtype=weight.dtype)  # fmt: skip
        layers[name].symmetric = config.symmetric
    return layers


def quantized_bytes(model: Any, layers: Mapping[str, QuantLinear], config: QuantizeConfig) -> int:
    """Of the folder that will be written, without headers and masks; the model and ``layers`` may be on ``meta``."""
    planned = plan_tensors(model, layers, config.format, planned_dtypes(model, config.embeddings))
    fractions = sum(layer.in_features * layer.out_features for layer in layers.values()) if config.keep_fractions else 0
    return sum(tensor.nbytes for tensor in planned.values()) + fractions


def _beside(w_OI: Tensor, *values: Any) -> Tensor:
    """The weight where its statistics are: one that accelerate has off-loaded is not."""
    tensors = (v for value in values for v in (value if isinstance(value, tuple) else [value]) if v is not None)
    first = next(tensors, None)
    return w_OI if first is None else w_OI.to(first.device)
