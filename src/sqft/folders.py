"""``sqft.load`` and ``sqft.save``: any stage folder to a live model and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sqft import artifact
from sqft.errors import SqftError, shown
from sqft.formats.checkpoint import is_packed_folder, load_packed, load_weights, packed_layers, save_packed
from sqft.formats.compact import CompactReader, is_compact
from sqft.formats.fractions import attach_fractions, load_fractions, save_fractions, stored_fractions
from sqft.kernels.dispatch import pick_device, release_memory
from sqft.models.dense import load_dense, load_tokenizer
from sqft.models.gguf import parsed_once
from sqft.models.tensors import MAX_SHARD_BYTES
from sqft.models.types import Tokenizer
from sqft.models.weights import stored_state
from sqft.sparsity.masks import attach_masks, ensure_masks, load_masks, save_masks, stored_masks
from sqft.strict import plain_path, read_object

ADAPTER_CONFIG = "adapter_config.json"


def load(source: str | Path, *, dtype: str = "auto", device: str = "cpu", mask: str | None = None,
         trainable: bool = False) -> tuple[Any, Tokenizer]:  # fmt: skip
    """A model, of whatever stage, and its tokenizer.

    A dense, sparse, merged, packed (GPTQ, compressed-tensors) or compact folder, a GGUF file or a hub name gives a
    ``transformers`` model, with its masks (packed weights are ``QuantLinear`` layers, with their fractions); an adapter
    folder gives a ``PeftModel`` on its base.

    Args:
        dtype: 'auto' (as stored), 'float32', 'bfloat16' or 'float16'; of what is not packed.
        device: 'cpu', 'auto' (the accelerator if there is one), or an accelerator's name. Weights go there from the
            file, one after the other.
        mask: 'zeros' takes the zeros of a packed model that has no masks as pruned; see ``ensure_masks``.
        trainable: to go on training an adapter.

    Raises SqftError naming what is wrong, UsageError for a wrong option.
    """
    target = pick_device(device)
    if is_adapter(source):
        from sqft.adapters.peft_bridge import load_adapter

        base_source = base_of(source)
        if _adapter_config(source).get("sparse_adapter"):  # it was trained on a base with masks
            mask = "zeros"
        base, tokenizer = load(base_source, dtype=dtype, device=device, mask=mask)
        return load_adapter(base, source, trainable).eval(), tokenizer
    artifact.check_input(source)
    with parsed_once(source):
        model, masks = _load_model(source, dtype)
        tokenizer = load_tokenizer(source)
    model.to(target)
    attach_masks(model, masks)
    attach_fractions(model, load_fractions(source))
    ensure_masks(model, mask)
    release_memory()  # what masks were compared with
    return model, tokenizer


def _load_model(source: str | Path, dtype: str) -> tuple[Any, dict[str, Tensor]]:
    """The model, and its masks."""
    if is_compact(source):
        reader = CompactReader(source)
        return load_weights(reader, dtype, reader.config), reader.masks()
    load_one = load_packed if is_packed_folder(source) else load_dense
    return load_one(source, dtype), load_masks(source)


def _adapter_config(folder: str | Path) -> dict[str, Any]:
    file = Path(folder) / ADAPTER_CONFIG
    try:
        config = read_object(file)
    except (OSError, ValueError) as error:
        raise SqftError(f"{file} is corrupt ({error})") from None
    base = config.get("base_model_name_or_path")
    if not (isinstance(base, str) and plain_path(base)):
        raise SqftError(f"{file} is corrupt (base_model_name_or_path is {shown(repr(base))})")
    return config


def is_adapter(source: str | Path) -> bool:
    return (Path(source) / ADAPTER_CONFIG).is_file()


def base_of(adapter: str | Path) -> str:
    """The base model's folder or name of an adapter folder. Raises SqftError if it is gone or has changed."""
    folder = Path(adapter)
    manifest = artifact.check_files(folder) if artifact.is_stage(folder) else None
    if manifest is None or manifest.parent is None:  # written by PEFT or Trainer, or from a live model
        return _adapter_config(folder)["base_model_name_or_path"]
    named, key = (manifest.base, manifest.base_key) if manifest.base else (manifest.parent, manifest.parent_key)
    base = artifact.resolve_parent(folder, named)
    if not Path(base).exists() and base.startswith("."):
        raise SqftError(f"the base model of {folder} is gone: its manifest names {base}")
    if artifact.folder_key(base) != key:
        raise SqftError(
            f"{base} is not the model that {folder} was trained on (it has changed since): train again, or restore it"
        )
    return base


def save(model: nn.Module, tokenizer: Tokenizer, out: str | Path, *, parent: str | Path = "",
         overwrite: bool = False) -> None:  # fmt: skip
    """Writes a live model (or a ``PeftModel``'s adapter), its tokenizer, masks and manifest as one stage folder,
    identified by its contents. ``parent``: what it was made from; of an adapter, its base's folder. Raises UsageError
    or SqftError if it cannot be written."""
    with artifact.stage("save", None, out, parent, overwrite=overwrite) as made:
        write_files(model, tokenizer, made.folder)


def write_files(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """What ``save`` writes, into a folder that is there. Raises SqftError for an adapter that is not finite."""
    for name, parameter in model.named_parameters() if getattr(model, "peft_config", None) else ():
        if ".lora_" in name and parameter.device.type != "meta" and not bool(parameter.isfinite().all()):
            raise SqftError(f"the adapter has weights that are not finite ({name}): its training has diverged")
    if packed_layers(model) and not getattr(model, "peft_config", None):
        save_packed(model, tokenizer, folder, MAX_SHARD_BYTES)
    else:
        away = any(parameter.device.type == "meta" for parameter in model.parameters())  # accelerate has it
        state = {"state_dict": dict(stored_state(model))} if away else {}
        model.save_pretrained(folder, **state)
    tokenizer.save_pretrained(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        from sqft.adapters.peft_bridge import in_order

        in_order(folder)
        return  # masks and fractions are the base's
    if masks := stored_masks(model):
        save_masks(masks, folder)
    if fractions := stored_fractions(model):
        save_fractions(fractions, folder)
