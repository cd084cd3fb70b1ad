"""A model without weights goes through a recipe's stages: options that do not fit it (a group size, a module pattern)
are the same errors as in the run itself, only earlier. Nothing is loaded, every tensor lies on the ``meta`` device.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from sqft.adapters.groups import make_groups
from sqft.compressing.passes import patterns, quantized_bytes, quantized_layers
from sqft.errors import SqftError, first_line
from sqft.formats.checkpoint import is_packed_folder
from sqft.models.dense import DTYPES, locate
from sqft.models.discover import describe, resolve_targets
from sqft.planning.estimate import Shape, load, measure
from sqft.planning.workload import NotHere
from sqft.recipe import Step
from sqft.registry import KINDS
from sqft.stages import STAGES
from sqft.training.loop import check_kind


def skeleton(source: str | Path) -> Any:
    """The model of a folder, .gguf file or hub name without weights. Code that comes with a model is not run. Raises
    SqftError if there is no configuration to be had, or it is not of a causal language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, gguf = locate(source)
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)
        vars(config).pop("quantization_config", None)
        dtype = torch.float32 if gguf else getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; each means that there is nothing to count
        raise SqftError(f"the configuration of {source} is not here: {first_line(error)}") from error


def shape_of(model: Any) -> Shape:
    """The sizes of a float model, live or a skeleton."""
    config, architecture = model.config.get_text_config(), describe(model)
    sizes, itemsize = [weight.shape for weight in architecture.weights()], model.dtype.itemsize
    parameters, weights = sum(p.numel() for p in model.parameters()), sum(map(math.prod, sizes))
    return Shape(parameters, parameters * itemsize, itemsize, weights, [inputs for _, inputs in sizes],
                 len(architecture.blocks), config.hidden_size, config.vocab_size)  # fmt: skip


class Walk:
    """A skeleton on its way. ``shapes``: the model in each folder, ``speed``: what this machine does in a second."""

    def __init__(self, source: str) -> None:
        self.model = skeleton(source)
        self.architecture = describe(self.model)
        self.packed = is_packed_folder(source)  # its layers are float ones in the skeleton
        shape = shape_of(self.model)
        size = shape.bytes - self.packed * shape.weights * (shape.itemsize - 4.5 / 8)
        self.shapes = {source: shape._replace(bytes=size, packed=self.packed, gguf=locate(source)[1] is not None)}
        self.speed = measure(self.model.dtype)

    def take(self, step: Step) -> dict[str, Any]:
        """What a step needs; if its data is not here a note, but no time and memory."""
        before, stage = self.shapes[step.source], STAGES[step.stage]
        after = self.shapes[str(step.folder)] = self._change(before, step)
        makes = KINDS[step.config.adapter].makes if step.stage == "train" else stage.makes
        needs = {"disk_bytes": {"model": after.bytes, "adapter": 4 * after.factors, "numbers": None}[makes]}
        try:
            shape = after if step.stage == "train" else before
            cost = load(shape) + stage.estimator()(shape, step.config)
        except NotHere:
            return {**needs, "note": "data not here: no estimate (--data-dir)"}
        needs |= {"seconds": cost.seconds(self.speed), "memory_bytes": cost.memory}
        return {**needs, "flops": cost.products + cost.float32}

    def _change(self, shape: Shape, step: Step) -> Shape:
        config = step.config
        if step.stage == "sparsify":
            patterns(self.architecture, config)
            if config.dtype != "auto":
                self.model.to(DTYPES[config.dtype])
            return shape_of(self.model)
        if step.stage == "quantize":
            layers = quantized_layers(self.architecture, config)
            size = quantized_bytes(self.model, layers, config)
            for weight in self.architecture.weights():
                if weight.name in layers:
                    weight.replace(layers[weight.name])
            return shape._replace(bytes=size, packed=True, gguf=False)
        if step.stage == "train":
            if not self.packed:
                check_kind(self.model, KINDS[config.adapter], step.source)
            if KINDS[config.adapter].whole:
                return shape._replace(adapted=shape.weights)
            names = resolve_targets(self.architecture, config.target_modules)
            choices = config.search_space or [0 if KINDS[config.adapter].scales_only else config.r]
            make_groups(names, config.rank_groups, choices)
            sizes = [weight.shape for weight in self.architecture.weights() if weight.name in names]
            return shape._replace(adapted=sum(map(math.prod, sizes)), factors=max(choices) * sum(map(sum, sizes)))
        return shape
