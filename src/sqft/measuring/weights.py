"""Histograms of the weights of folders, read tensor by tensor: one matrix is in memory at a time."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sqft.errors import SqftError
from sqft.kernels.packed import unpack_mask
from sqft.keys import MASKS
from sqft.quantization.linear import QuantLinear
from sqft.registry import FORMATS

BUDGET = 120_000_000  # weights that are read of one folder: seconds, whatever the model's size
BINS = 61  # of float weights; odd, so that one lies around 0


@dataclass
class Histogram:
    """Counts of a folder's weights. ``kept`` maps a bin (integer level, or the middle of a range) to its weights that
    are not pruned."""

    kept: Counter[float] = field(default_factory=Counter)
    pruned: int = 0

    @property
    def total(self) -> int:
        return self.pruned + sum(self.kept.values())


class WeightFolder:
    """The linear weights of the decoder blocks in a folder's safetensors files; ``sizes``: weights by module name.
    Raises SqftError if the folder cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shapes: dict[str, list[int]] = {}
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            settings = config.get("quantization_config")
            self.coder: Any = FORMATS[settings["quant_method"]] if settings else None
            self.settings: Any = self.coder.read_config(settings) if settings else None
            self._places: dict[str, Path] = {}  # of tensors, and of masks by the names of their modules
            for file in (*sorted(folder.glob("model*.safetensors")), *folder.glob(str(MASKS))):
                with safe_open(file, "pt") as stream:
                    for key in stream.keys():  # noqa: SIM118
                        self._places[key], shapes[key] = file, stream.get_slice(key).get_shape()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise SqftError(f"the weights of {folder} cannot be read ({error})") from None
        leaf, bits = (f".{self.coder.key}", self.settings.bits) if self.coder else (".weight", 32)
        blocks = (key for key in shapes if any(part.isdigit() for part in key.split(".")))
        self.sizes = {key.removesuffix(leaf): math.prod(shapes[key]) * 32 // bits for key in blocks
                      if key.endswith(leaf) and len(shapes[key]) == 2}  # fmt: skip

    @property
    def packed(self) -> bool:
        return self.coder is not None

    def levels(self, module: str) -> Tensor:
        """int16 [O, I]: integers of a packed weight relative to their zero points."""
        tensors = {key.rpartition(".")[2]: self._read(key) for key in self._places if key.rpartition(".")[0] == module}
        layer: QuantLinear = self.coder.decode(module, tensors, self.settings)
        return layer.integers().short() - layer.grid().zero_OG.short()[:, layer.g_idx.long()]

    def pruned(self, module: str, level_OI: Tensor) -> int:
        """How many zeros of a packed weight were pruned: none, if the folder has no mask of it."""
        if module not in self._places:
            return 0
        mask, zero_OI = self._read(module), level_OI == 0
        if mask.dtype == torch.int32:  # positions of the zeros that were kept
            return int(zero_OI.sum()) - mask.numel()
        return int((zero_OI & ~unpack_mask(mask, level_OI.shape[1])).sum())

    def weight(self, module: str) -> Tensor:
        """float32 of a float weight."""
        return self._read(f"{module}.weight").float()

    def _read(self, key: str) -> Tensor:
        try:
            with safe_open(self._places[key], "pt") as stream:
                return stream.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise SqftError(f"the weights of {self.folder} cannot be read ({error})") from None


def chosen(sizes: dict[str, int], budget: int = BUDGET) -> list[str]:
    """Modules whose weights are within the budget, spread evenly over the model."""
    total = sum(sizes.values())
    if total <= budget:
        return list(sizes)
    names, share = list(sizes), budget / total
    return [name for i, name in enumerate(names) if int((i + 1) * share) > int(i * share)] or names[:1]


def count_levels(folder: WeightFolder, names: Sequence[str]) -> Histogram:
    """Counts of the integer levels of a packed folder; those of 8 bits in groups of nine."""
    counts = Histogram()
    width = 9 if folder.settings.bits == 8 else 1
    for name in names:
        level_OI = folder.levels(name)
        pruned = folder.pruned(name, level_OI)
        for value, number in enumerate(torch.bincount((level_OI + 256).flatten()).tolist(), -256):
            if number:
                counts.kept[float(round(value / width) * width)] += number
        counts.kept[0.0] -= pruned
        counts.pruned += pruned
    return counts


def spread(folder: WeightFolder, names: Sequence[str]) -> float:
    """Four standard deviations of the weights that are not zero: the range of a histogram."""
    squares, number = 0.0, 0
    for name in list(names)[:: max(1, len(names) // 8)]:
        weight = folder.weight(name)
        squares += float(weight.double().square().sum())
        number += int(torch.count_nonzero(weight))
    return 4 * (squares / max(1, number)) ** 0.5 or 1.0


def count_values(folder: WeightFolder, names: Sequence[str], reach: float) -> Histogram:
    """Counts of the weights of a float folder in ``BINS`` ranges of [-reach, reach], of which the outermost have what
    lies beyond; exact zeros count as pruned."""
    counts = Histogram()
    width, totals = 2 * reach / BINS, torch.zeros(BINS, dtype=torch.float64)
    for name in names:
        weight = folder.weight(name)
        zeros = weight.numel() - int(torch.count_nonzero(weight))
        totals += torch.histc(weight.clamp(-reach, reach), BINS, -reach, reach).double()
        totals[BINS // 2] -= zeros
        counts.pruned += zeros
    counts.kept = Counter({(i - BINS // 2) * width: int(n) for i, n in enumerate(totals.tolist())})
    return counts
