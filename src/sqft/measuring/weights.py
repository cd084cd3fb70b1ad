"""Histograms of the weights of folders, read tensor by tensor: one matrix is in memory at a time."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sqft.errors import SqftError
from sqft.formats.compact import coder_of, config_of, masks_of, open_weights
from sqft.kernels.packed import unpack_mask
from sqft.quantization.linear import QuantLinear
from sqft.sparsity.masks import count_zeros

BUDGET = 120_000_000  # weights that are read of one folder: seconds, whatever the model's size


class Histogram(NamedTuple):
    """Percentages of all weights of ``matrices``. ``outline``: where each range of weights begins and what it holds but
    for the ``pruned`` ones, from zero up and back to zero."""

    matrices: int
    width: float
    outline: list[tuple[float, float]]
    pruned: float


class WeightFolder:
    """The linear weights of the decoder blocks of a model folder; ``sizes``: weights by module name, ``bits``: of each
    if they are packed, else 0. Raises SqftError if the folder cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._reader = folder, open_weights(folder)
        self.bits, leaf = 0, ".weight"
        try:
            coded = coder_of(config_of(self._reader))
        except (KeyError, TypeError, AttributeError) as error:
            raise SqftError(f"{folder / 'config.json'} cannot be read ({error})") from None
        if coded is not None:
            self._coder, self._settings = coded
            self._masks = masks_of(self._reader)
            self.bits, leaf = self._settings.bits, f".{self._coder.key}"
        self.sizes = {key.removesuffix(leaf): tensor.numel() * 32 // (self.bits or 32)
                      for key, tensor in self._reader.layout.items()
                      if key.endswith(leaf) and tensor.ndim == 2 and re.search(r"\.\d+\.", key)}  # fmt: skip

    def read(self, module: str) -> tuple[Tensor, int]:
        """A weight, and how many of its zeros were pruned. Of a packed one: its integers relative to their zero points,
        and the zeros that its mask has; of a float one all zeros count."""
        if not self.bits:
            weight = self._reader.get(f"{module}.weight").float()
            return weight, count_zeros(weight)
        keys = [key for key in self._reader.layout if key.rpartition(".")[0] == module]
        tensors = {key.rpartition(".")[2]: self._reader.get(key) for key in keys}
        layer: QuantLinear = self._coder.decode(module, tensors, self._settings)
        level_OI = layer.integers().short() - layer.grid().zero_OG.short()[:, layer.g_idx.long()]
        if (mask := self._masks.get(module)) is None:
            return level_OI, 0
        positions = mask.dtype == torch.int32  # of the zeros that were kept
        kept = mask.numel() if positions else int((unpack_mask(mask, level_OI.shape[1]) & (level_OI == 0)).sum())
        return level_OI, count_zeros(level_OI) - kept


def histograms(folders: Sequence[WeightFolder]) -> list[Histogram]:
    """Of folders of one kind, all packed or all float, over the modules that all of them have; of a large model over as
    many of these, from all over it and always the same, as are within the budget. Raises SqftError if there is none."""
    first = folders[0]
    names = [name for name in first.sizes if all(name in folder.sizes for folder in folders)]
    if not names:
        raise SqftError(f"{first.folder} has no linear weights that {folders[-1].folder} has as well")
    affordable = len(names) * BUDGET // sum(first.sizes[name] for name in names)
    names = random.Random(0).sample(names, min(max(1, affordable), len(names)))
    width, half = (1.0, 2**first.bits - 1) if first.bits else (_spread(first, names[:8]) / 8, 32)
    return [_count(folder, names, width, half) for folder in folders]


def _spread(folder: WeightFolder, names: Sequence[str]) -> float:
    """The standard deviation of the weights that are not zero."""
    spreads = [float(w.norm()) / max(1, w.numel() - zeros) ** 0.5 for w, zeros in map(folder.read, names)]
    if not math.isfinite(spread := sum(spreads) / len(spreads)):
        raise SqftError(f"{folder.folder} has weights that are no finite numbers")
    return spread or 1.0


def _count(folder: WeightFolder, names: Sequence[str], width: float, half: int) -> Histogram:
    """With ``half`` ranges on each side of the one around zero; the outermost have what lies beyond."""
    kept, pruned = torch.zeros(2 * half + 1, dtype=torch.int64), 0
    for name in names:
        weight, zeros = folder.read(name)
        place = (weight / width).round_().clamp_(-half, half).add_(half).to(torch.int16)
        kept += torch.bincount(place.flatten(), minlength=len(kept))
        kept[half] -= zeros
        pruned += zeros
    total = int(kept.sum()) + pruned
    edges = [(i - half - 0.5) * width for i in range(len(kept) + 1)]
    outline = [(edges[0], 0.0), *zip(edges, [*(kept * 100 / total).tolist(), 0.0], strict=True)]
    return Histogram(len(names), width, outline, pruned * 100 / total)
