"""A model's sizes from its configuration alone: nothing is loaded, every tensor lies on the ``meta`` device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from sqft.errors import SqftError
from sqft.models.dense import locate
from sqft.models.discover import Architecture, describe


def skeleton(source: str | Path) -> Any:
    """The model of a folder, .gguf file or hub name without weights. Code that comes with a model is not run. Raises
    SqftError if there is no configuration to be had, or it is not of a causal language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, gguf = locate(source)
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        dtype = torch.float32 if gguf else getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; each means that there is nothing to count
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SqftError(f"the configuration of {source} is not here: {reason}") from error


class Linear(NamedTuple):
    """A linear layer of a decoder block."""

    name: str
    outputs: int
    inputs: int

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs


class Shape(NamedTuple):
    """Counts of weights: of the model, its blocks' linear layers, and the head, with which every token is multiplied
    too; the most features that a linear layer of a block reads or writes; bytes a weight."""

    parameters: int
    linears: tuple[Linear, ...]
    weights: int
    inner: int
    head: int
    layers: int
    hidden: int
    vocabulary: int
    itemsize: int


def shape_of(model: Any, architecture: Architecture | None = None) -> Shape:
    """The sizes of a model, live or a skeleton."""
    architecture = architecture or describe(model)
    config, parameters = model.config.get_text_config(), list(model.parameters())
    linears = tuple(Linear(weight.name, *weight.shape) for weight in architecture.weights())
    inner = max(max(linear.inputs, linear.outputs) for linear in linears)
    return Shape(sum(p.numel() for p in parameters), linears, sum(linear.weights for linear in linears), inner,
                 config.vocab_size * config.hidden_size, len(architecture.blocks), config.hidden_size,
                 config.vocab_size, parameters[0].element_size())  # fmt: skip
