"""What a merge promises: all that was trained is in the merged model, or nothing is written and nothing changed."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pico import FAMILIES, pico_model, pico_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import sqft
import sqft.merging.changes
import sqft.merging.stage
from sqft import probe
from sqft.adapters.peft_bridge import adapter_layers
from sqft.formats.checkpoint import packed_layers
from sqft.kernels import quant_ops
from sqft.models.discover import describe
from sqft.quantization import linear
from sqft.sparsity.masks import collect_masks, mask_of

INT4 = sqft.QuantizeConfig(group_size=32)


def base(kind: str, tokens, family: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A pico model, pruned ('sparse'), pruned and packed ('packed'), or neither ('dense')."""
    if config:
        torch.manual_seed(0)
        settings = AutoConfig.for_model(family, **{**FAMILIES[family], **config})
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()
    else:
        model = pico_model(family, dtype)
    if kind != "dense":
        sqft.sparsify(model, sqft.SparsifyConfig(), tokens)
    if kind == "packed":
        sqft.quantize(model, INT4, tokens)
    return model


def trained(model: Any, config: LoraConfig) -> Any:
    """An adapter of which everything that can be trained has moved."""
    adapter = sqft.attach(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05)
    return adapter.eval()


def folders(adapter: Any, folder: Path) -> Path:
    """The adapter as a folder, beside its base's."""
    model = copy.deepcopy(adapter)
    sqft.save(plain(model), pico_tokenizer(), folder / "base")
    adapter.peft_config["default"].base_model_name_or_path = str(folder / "base")
    sqft.save(adapter, pico_tokenizer(), folder / "adapter")
    return folder / "adapter"


def plain(adapter: Any) -> Any:
    """The base, its biases as they were: at zero, or where the random model has them."""
    return adapter.unload()


def logits(model: Any, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits
