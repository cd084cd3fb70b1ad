"""Masks: which weights may be non-zero, one bit a weight, in memory, on a module and on disk.

A mask is an artefact of its own because zero does not mean pruned: a kept weight may be zero by chance, and an INT4
weight may round to zero. In a live model it is the non-persistent buffer ``sqft_mask`` of the linear module (so it
follows ``.to(device)`` and is not in the state dict); in a folder it is ``masks/masks.safetensors``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqft.errors import SqftError, UsageError
from sqft.kernels.packed import pack_mask, unpack_mask
from sqft.keys import MASKS
from sqft.models.tensors import save_tensors
from sqft.models.weights import MASK, Weight, is_linear, linear_weights

SPARSE_FROM = 0.2  # share of zeros from which another tool's float weight counts as pruned

logger = logging.getLogger(__name__)


def packed_mask(module: nn.Module) -> Tensor | None:
    """uint8 [O, ceil(I / 8)] of a linear module, or None if it was never pruned."""
    return getattr(module, MASK, None)


def mask_of(module: Any) -> Tensor | None:
    """bool [O, I] of a linear module, or None."""
    return Weight("", module).mask


def ensure_masks(model: nn.Module, mask: str | None = None) -> list[str]:
    """Decides which weights of a model are pruned, where no mask says so; afterwards "pruned" means "has a mask".

    A model that has masks keeps those, and its weights without one are dense. In any other, which another tool may have
    made sparse, a float weight of which at least a fifth is zero, or whose zeros follow an N:M pattern, gets the mask
    of its zeros. (A dense weight that was rounded has zeros too: 5 % when it comes from GGUF.) A packed weight is
    dense, since its zeros do not tell: 13 % of a dense INT4 weight's, 60 % at 2 bits; with ``mask`` "zeros" it gets
    the mask of its zeros. Returns the names of the weights that got a mask. Doing it again changes nothing.
    """
    if mask not in (None, "zeros"):
        raise UsageError(f"mask '{mask}' is not known: 'zeros' takes a packed model's zeros as pruned")
    if collect_masks(model):
        return []
    weights = list(linear_weights(model))
    found = []
    for weight in weights:
        if weight.device.type == "meta" or (weight.packed and mask is None):
            continue
        nonzero_OI = weight.nonzero()
        if weight.packed or _is_sparse(nonzero_OI):
            weight.set_mask(nonzero_OI)
            found.append(weight.name)
    if found:
        logger.info("the zeros of %d of %d linear weights are taken as pruned", len(found), len(weights))
    return found


def _is_sparse(nonzero_OI: Tensor) -> bool:
    zeros, total = count_zeros(nonzero_OI), nonzero_OI.numel()
    if zeros >= SPARSE_FROM * total:
        return True
    # N:M with less of it pruned, 7:8 and 15:16. Wider groups could all have a zero by chance.
    widths = (m for m in (8, 16) if nonzero_OI.shape[1] % m == 0 and zeros * m >= total)
    return any(not nonzero_OI.view(-1, m).all(1).any() for m in widths)


@dataclass
class ZeroCounts:
    """Weights, zeros, pruned weights, and ``filled``: pruned weights that are not zero."""

    weights: int = 0
    zeros: int = 0
    pruned: int = 0
    filled: int = 0

    def add(self, weight: Weight, packed_mask: Tensor | None = None) -> None:
        """Counts a weight; ``packed_mask`` replaces its own."""
        nonzero_OI = weight.nonzero()
        self.weights += nonzero_OI.numel()
        self.zeros += count_zeros(nonzero_OI)
        packed_mask = weight.packed_mask if packed_mask is None else packed_mask
        if packed_mask is not None:
            mask_OI = unpack_mask(packed_mask.to(nonzero_OI.device), nonzero_OI.shape[1])
            self.pruned += count_zeros(mask_OI)
            self.filled += int(torch.count_nonzero(nonzero_OI & ~mask_OI))

    def metrics(self) -> dict[str, Any]:
        """The counts, the share of zeros, and the share of pruned weights that are zero."""
        kept = (self.pruned - self.filled) / self.pruned if self.pruned else 1.0
        return {"pruned": self.pruned, "filled": self.filled, "zeros_kept": kept, "zeros": self.zeros,
                "sparsity": self.zeros / max(1, self.weights), "weights": self.weights}  # fmt: skip


def stored_masks(model: nn.Module) -> dict[str, Tensor]:
    """All masks of a live model as a folder holds them, by module name.

    Of a float weight: one bit a weight, uint8 [O, ceil(I / 8)], column 8 p + b is bit b of byte p, 1 is kept. Of an INT
    weight, of which that would be a quarter: int32 [N], the flat positions of kept weights that are zero all the same,
    since every other zero is a pruned weight; or bits where that is less.
    """
    return {name: as_stored(Weight(name, model.get_submodule(name)), packed)
            for name, packed in collect_masks(model).items()}  # fmt: skip


def as_stored(weight: Weight, packed: Tensor) -> Tensor:
    """A weight's mask uint8 [O, ceil(I / 8)] as ``stored_masks`` gives it."""
    if weight.packed:
        kept_zero = ~weight.nonzero() & unpack_mask(packed, weight.shape[1])
        positions = kept_zero.flatten().nonzero().flatten().to("cpu", torch.int32)
        if positions.numel() * 4 < packed.numel():
            return positions
    return packed.cpu().contiguous()


def save_masks(masks: dict[str, Tensor], folder: Path) -> None:
    """Writes what ``stored_masks`` gives."""
    (folder / MASKS).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(masks, folder / MASKS)


def load_masks(folder: str | Path) -> dict[str, Tensor]:
    """What ``save_masks`` wrote; empty if the folder has none. Raises SqftError for a corrupt file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(folder) / MASKS
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
        weight = Weight(name, module)
        packed = as_bits(weight, stored)
        rows, columns = weight.shape
        fits = packed.dtype == torch.uint8 and packed.shape == (rows, -(-columns // 8))
        if not fits or (columns % 8 and bool((packed[:, -1] >> (columns % 8)).any())):  # kernels count all bits
            raise SqftError(f"mask of '{name}' {tuple(packed.shape)} does not fit the model: masks of another model?")
        weight.set_packed_mask(packed)


def as_bits(weight: Weight, positions: Tensor) -> Tensor:
    """Inverse of ``as_stored``. Raises SqftError for positions that do not fit the weight's zeros."""
    if positions.dtype != torch.int32:
        return positions
    mask_OI = weight.nonzero().contiguous()
    flat, places = mask_OI.view(-1), positions.long().to(mask_OI.device)
    outside = bool(((places < 0) | (places >= flat.numel())).any())
    if places.ndim != 1 or outside or flat[places].any():
        raise SqftError(f"mask of '{weight.name}' does not fit the model's zeros: masks of another model?")
    flat[places] = True
    return pack_mask(mask_OI)


def collect_masks(model: nn.Module) -> dict[str, Tensor]:
    """All masks of a live model, packed, by module name."""
    return {name: mask for name, module in model.named_modules() if (mask := packed_mask(module)) is not None}


def count_zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.count_nonzero(tensor))
