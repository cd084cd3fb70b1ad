"""Where finished blocks go: they stay in the live model, or are written into a folder and dropped."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sqft import artifact
from sqft.compressing.passes import Pass
from sqft.formats.checkpoint import encoded, mark_packed, plan_tensors, quantization_config, write_quantize_config
from sqft.models.dense import load_dense, load_tokenizer, save_settings
from sqft.models.discover import Block
from sqft.models.tensors import MAX_SHARD_BYTES, ModelWriter
from sqft.sparsity.masks import attach_masks, load_masks, save_masks, stored_masks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sink(Protocol):
    def receive(self, blocks: Iterable[Block], model: Any, last: Pass) -> None:
        """Takes the blocks as the ``last`` pass finishes them."""
        ...


class InPlace:
    """The live model itself."""

    def receive(self, blocks: Iterable[Block], model: Any, last: Pass) -> None:
        for _ in blocks:
            pass
        if last.layers:
            mark_packed(model, last.format)


class Folder:
    """A stage folder: each block is written and dropped before the next one is touched."""

    def __init__(self, result: artifact.Writing, tokenizer: PreTrainedTokenizerBase) -> None:
        self.result, self.tokenizer = result, tokenizer

    def receive(self, blocks: Iterable[Block], model: Any, last: Pass) -> None:
        folder, masks = self.result.folder, {}
        writer = ModelWriter(plan_tensors(model, last.layers, last.format), folder, MAX_SHARD_BYTES)
        for block in blocks:
            for name, tensor in encoded(block.module, last.format, block.name + "."):
                writer.add(name, tensor)
            masks |= {f"{block.name}.{name}": mask for name, mask in stored_masks(block.module).items()}
            block.module.to("meta")
        if last.layers:
            model.config.quantization_config = quantization_config(model, last.layers, last.format)
            write_quantize_config(model.config.quantization_config, folder)
        for name, tensor in model.state_dict().items():  # what is not in the blocks
            if tensor.device.type != "meta":
                writer.add(name, tensor)
        writer.close()
        save_settings(model, self.tokenizer, folder)
        if masks:
            save_masks(masks, folder)


def load_float(source: str | Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A float model, dense or sparse, with its masks if it has any, and its tokenizer."""
    if artifact.is_stage(source):
        artifact.check_files(source)
    model = load_dense(source, dtype)
    attach_masks(model, load_masks(source))
    return model, load_tokenizer(source)
