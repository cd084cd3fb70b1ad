"""Where finished blocks go: they stay in the live model, or are written into a folder and dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

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
    def receive(self, blocks: Iterable[Block], model: Any, last: Pass,
                metrics: Callable[[], dict[str, Any]]) -> dict[str, Any]:  # fmt: skip
        """Takes the blocks as the ``last`` pass finishes them; returns the metrics, taken when all are finished."""
        ...


class InPlace:
    """The live model itself."""

    def receive(self, blocks: Iterable[Block], model: Any, last: Pass,
                metrics: Callable[[], dict[str, Any]]) -> dict[str, Any]:  # fmt: skip
        for _ in blocks:
            pass
        if last.layers:
            mark_packed(model, last.format)
        return metrics()


class Folder:
    """A stage folder: each block is written and dropped before the next one is touched."""

    def __init__(self, source: str, out: Path, overwrite: bool, settings: dict[str, Any]) -> None:
        """``settings`` is the manifest's config. Raises UsageError if ``out`` cannot be written."""
        artifact.check_output(out, overwrite)
        self.source, self.out, self.overwrite, self.settings = source, out, overwrite, settings
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def load(self, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The float model of the source, dense or sparse, with its masks if it has any, and its tokenizer."""
        if artifact.is_stage(self.source):
            artifact.check_files(self.source)
        model = load_dense(self.source, dtype)
        attach_masks(model, load_masks(self.source))
        self.tokenizer = load_tokenizer(self.source)
        return model, self.tokenizer

    def receive(self, blocks: Iterable[Block], model: Any, last: Pass,
                metrics: Callable[[], dict[str, Any]]) -> dict[str, Any]:  # fmt: skip
        assert self.tokenizer is not None
        masks: dict[str, Tensor] = {}
        with artifact.writing(self.out, self.overwrite) as folder:
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
            numbers = metrics()
            artifact.write_manifest(folder, artifact.Manifest(
                stage=last.stage, config=self.settings, seed=last.config.seed, metrics=numbers,
                parent=artifact.relative_parent(self.source, self.out), parent_key=artifact.folder_key(self.source),
            ))  # fmt: skip
        return numbers
