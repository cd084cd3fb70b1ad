"""Masks: which weights may be non-zero, one bit a weight, in memory, on a module and on disk.

A mask is an artefact of its own because zero does not mean pruned: a kept weight may be zero by chance, and an INT4
weight may round to zero. In a live model it is the non-persistent buffer ``sqft_mask`` of the linear module (so it
follows ``.to(device)`` and is not in the state dict); in a folder it is ``masks/masks.safetensors``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqft.artifact import MASKS as FILE
from sqft.errors import SqftError
from sqft.kernels.torch_ops import pack_mask, unpack_mask
from sqft.models.discover import is_linear, weight_of
from sqft.models.tensors import save_tensors

BUFFER = "sqft_mask"
SPARSE_FROM = 0.01  # share of zeros; a dense model has almost none (a de-quantized one 0.03 %)


def set_mask(module: nn.Module, mask_OI: Tensor) -> None:
    """Remembers bool [O, I] (True: may be non-zero) on a linear module, packed."""
    module.register_buffer(BUFFER, pack_mask(mask_OI), persistent=False)


def packed_mask(module: nn.Module) -> Tensor | None:
    """uint8 [O, ceil(I / 8)] of a linear module, or None if it was never pruned."""
    return getattr(module, BUFFER, None)


def mask_of(module: Any) -> Tensor | None:
    """bool [O, I] of a linear module, or None."""
    packed = packed_mask(module)
    return None if packed is None else unpack_mask(packed, module.in_features)


def derive_mask(module: nn.Module) -> Tensor:
    """For a model that other tools made sparse: bool [O, I], True where the weight is not zero."""
    return weight_of(module) != 0


def mask_or_zeros(module: nn.Module) -> Tensor | None:
    """bool [O, I]: the module's mask or, if another tool pruned it, what its zeros say; None for a dense weight."""
    mask = mask_of(module)
    if mask is None and count_zeros(weight := weight_of(module)) >= SPARSE_FROM * weight.numel():
        mask = weight != 0
    return mask


def stored_masks(model: nn.Module) -> dict[str, Tensor]:
    """All masks of a live model as a folder holds them, by module name.

    Of a float weight: one bit a weight, uint8 [O, ceil(I / 8)], column 8 p + b is bit b of byte p, 1 is kept. Of an INT
    weight, of which that would be a quarter: int32 [N], the flat positions of kept weights that are zero all the same,
    since every other zero is a pruned weight; or bits where that is less.
    """
    stored = {}
    for name, packed in collect_masks(model).items():
        module: Any = model.get_submodule(name)
        stored[name] = packed.cpu().contiguous()
        if hasattr(module, "qweight"):
            kept_zero = (weight_of(module) == 0) & unpack_mask(packed, module.in_features)
            positions = kept_zero.flatten().nonzero().flatten().to("cpu", torch.int32)
            if positions.numel() * 4 < packed.numel():
                stored[name] = positions
    return stored


def save_masks(masks: dict[str, Tensor], folder: Path) -> None:
    """Writes what ``stored_masks`` gives."""
    (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(masks, folder / FILE)


def load_masks(folder: str | Path) -> dict[str, Tensor]:
    """What ``save_masks`` wrote; empty if the folder has none. Raises SqftError for a corrupt file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(folder) / FILE
    if not file.is_file():
        return {}
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise SqftError(f"{file} is corrupt or truncated ({error}): run the sparsify stage again") from None


def attach_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Puts masks of ``load_masks`` on the modules they belong to. Raises SqftError if names or shapes do not fit."""
    modules = dict(model.named_modules())
    for name, stored in masks.items():
        module = modules.get(name)
        if module is None or not is_linear(module):
            raise SqftError(f"there is a mask of '{name}' but no such linear module: masks of another model?")
        linear: Any = module
        packed = _from_positions(name, linear, stored) if stored.dtype == torch.int32 else stored
        if packed.shape != (linear.out_features, -(-linear.in_features // 8)):
            raise SqftError(f"mask of '{name}' {tuple(packed.shape)} does not fit the model: masks of another model?")
        device = next(iter(linear.state_dict().values())).device
        linear.register_buffer(BUFFER, packed.to(device), persistent=False)


def _from_positions(name: str, module: Any, positions: Tensor) -> Tensor:
    """The packed mask of a weight whose pruned positions are its zeros but for these."""
    mask_OI = (weight_of(module) != 0).contiguous()
    flat, places = mask_OI.view(-1), positions.long().to(mask_OI.device)
    if places.numel() and (places.min() < 0 or places.max() >= flat.numel() or flat[places].any()):
        raise SqftError(f"mask of '{name}' does not fit the model's zeros: masks of another model?")
    flat[places] = True
    return pack_mask(mask_OI)


def collect_masks(model: nn.Module) -> dict[str, Tensor]:
    """All masks of a live model, packed, by module name."""
    return {name: mask for name, module in model.named_modules() if (mask := packed_mask(module)) is not None}


def count_zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.count_nonzero(tensor))
