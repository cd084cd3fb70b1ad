"""A model without weights goes through a recipe's stages: options that do not fit it (a group size, a module pattern)
are the same errors as in the run itself, only earlier. Nothing is loaded, every tensor lies on the ``meta`` device.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

from sqft.adapters.groups import make_groups
from sqft.compressing.passes import patterns, quantized_bytes, quantized_layers
from sqft.errors import SqftError
from sqft.formats.checkpoint import is_packed_folder
from sqft.measuring.speed import measure
from sqft.models.dense import DTYPES, load_tokenizer, locate, skeleton
from sqft.models.discover import describe, resolve_targets
from sqft.planning.estimate import Shape, adapted, load, shape_of
from sqft.planning.workload import NotHere, counted
from sqft.recipe import Step
from sqft.registry import KINDS
from sqft.stages import STAGES
from sqft.training.loop import check_kind


class Walk:
    """A skeleton on its way. ``shapes``: the model in each folder, ``speed``: what this machine does in a second."""

    def __init__(self, source: str) -> None:
        self.model = skeleton(source)
        self.architecture = describe(self.model)
        self.packed = is_packed_folder(source)  # its layers are float ones in the skeleton
        shape = shape_of(self.model)
        size = shape.bytes - self.packed * shape.weights * (shape.itemsize - 4.5 / 8)
        gguf = locate(source)[1] is not None
        shape = shape._replace(bytes=size, packed=self.packed, gguf=gguf)
        with contextlib.suppress(SqftError):  # the run's to say; and that of a GGUF file takes long
            shape = shape if gguf else shape._replace(counter=partial(counted, tokenizer=load_tokenizer(source)))
        self.shapes = {source: shape}
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
            return shape_of(self.model)._replace(counter=shape.counter)
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
                return shape._replace(adapted=shape.weights, adapted_active=shape.active)
            names = resolve_targets(self.architecture, config.target_modules)
            choices = config.search_space or [0 if KINDS[config.adapter].scales_only else config.r]
            make_groups(names, config.rank_groups, choices)
            return adapted(shape, self.model, self.architecture, names, max(choices))
        return shape._replace(factors=0) if step.stage == "merge" else shape
