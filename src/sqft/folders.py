"""``sqft.load`` and ``sqft.save``: any stage folder to a live model and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sqft import artifact
from sqft.errors import SqftError
from sqft.formats.checkpoint import is_packed, load_packed, packed_layers, save_packed
from sqft.models.dense import load_dense, load_tokenizer
from sqft.models.tensors import MAX_SHARD_BYTES
from sqft.sparsity.masks import attach_masks, load_masks, save_masks, stored_masks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"


def load(source: str | Path, *, dtype: str = "auto", trainable: bool = False) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model, of whatever stage, and its tokenizer.

    A dense, sparse, merged or packed (GPTQ, compressed-tensors) folder, a GGUF file or a hub name gives a
    ``transformers`` model, with its masks if it has any (packed weights are ``QuantLinear`` layers); an adapter folder
    gives a ``PeftModel`` on its base (with ``trainable``, to go on training).
    ``dtype``: 'auto' (as stored), 'float32', 'bfloat16' or 'float16'. Raises SqftError naming what is wrong.
    """
    if is_adapter(source):
        from sqft.adapters.peft_bridge import load_adapter

        base, tokenizer = load(base_of(source), dtype=dtype)
        return load_adapter(base, source, trainable).eval(), tokenizer
    if artifact.is_stage(source):
        artifact.check_files(source)
    model = load_packed(source, dtype) if is_packed(source) else load_dense(source, dtype)
    attach_masks(model, load_masks(source))
    return model, load_tokenizer(source)


def is_adapter(source: str | Path) -> bool:
    return (Path(source) / ADAPTER_CONFIG).is_file()


def base_of(adapter: str | Path) -> str:
    """The base model's folder or name of an adapter folder. Raises SqftError if it is gone or has changed."""
    folder = Path(adapter)
    manifest = artifact.check_files(folder) if artifact.is_stage(folder) else None
    if manifest is None or manifest.parent is None:  # written by PEFT or Trainer, or from a live model
        try:
            return json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
        except (OSError, ValueError, KeyError) as error:
            raise SqftError(f"{folder / ADAPTER_CONFIG} is corrupt ({error})") from None
    base = artifact.resolve_parent(folder, manifest.parent)
    if not Path(base).exists() and base.startswith("."):
        raise SqftError(f"the base model of {folder} is gone: its manifest names {base}")
    if artifact.folder_key(base) != manifest.parent_key:
        raise SqftError(
            f"{base} is not the model that {folder} was trained on (it has changed since): train again, or restore it"
        )
    return base


def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase, out: str | Path, *, stage: str = "save",
         config: dict[str, Any] | None = None, metrics: dict[str, Any] | None = None, parent: str | Path = "",
         seed: int | None = None, key: str = "", extra: Path | None = None,
         overwrite: bool = False) -> None:  # fmt: skip
    """Writes a live model (or a ``PeftModel``'s adapter), its tokenizer, masks and manifest as one stage folder.

    ``key`` identifies the result; without it the contents do. The files of the folder ``extra`` go along.
    """
    with artifact.writing(out, overwrite) as folder:
        if packed_layers(model) and not getattr(model, "peft_config", None):
            save_packed(model, tokenizer, folder, MAX_SHARD_BYTES)
        else:
            model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        tokenizer.save_pretrained(folder)
        masks = {} if (folder / ADAPTER_CONFIG).is_file() else stored_masks(model)
        if masks:
            save_masks(masks, folder)
        if extra is not None and extra.is_dir():
            shutil.copytree(extra, folder, dirs_exist_ok=True)
        artifact.write_manifest(folder, artifact.Manifest(
            stage=stage, key=key or artifact.folder_key(folder), config=config or {}, metrics=metrics or {}, seed=seed,
            parent=artifact.relative_parent(parent, out) if parent else None,
            parent_key=artifact.folder_key(parent) if parent else "",
        ))  # fmt: skip
