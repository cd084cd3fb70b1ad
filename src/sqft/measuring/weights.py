"""Histograms of the weights of folders, read tensor by tensor: one matrix is in memory at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
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
    are not pruned, ``beyond`` of them lie outside all bins; ``zeros`` maps a module to (zeros, weights)."""

    kept: Counter[float] = field(default_factory=Counter)
    pruned: int = 0
    beyond: int = 0
    zeros: dict[str, tuple[int, int]] = field(default_factory=dict)
    modules: int = 0
    of_modules: int = 0

    @property
    def total(self) -> int:
        return self.pruned + self.beyond + sum(self.kept.values())


class WeightFolder:
    """The linear weights of the decoder blocks in a folder's safetensors files; ``sizes``: weights by module name.

    Raises SqftError if the folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            settings = config.get("quantization_config")
            self.coder: Any = FORMATS[settings["quant_method"]] if settings else None
            self.settings = self.coder.read_config(settings) if settings else None
            self._places: dict[str, Path] = {}
            for file in sorted(folder.glob("model*.safetensors")):
                with safe_open(file, "pt") as stream:
                    self._places.update(dict.fromkeys(stream.keys(), file))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise SqftError(f"the weights of {folder} cannot be read ({error})") from None
        leaf = f".{self.coder.key}" if self.coder else ".weight"
        names = (key.removesuffix(leaf) for key in self._places if key.endswith(leaf))
        blocks = [name for name in names if any(part.isdigit() for part in name.split("."))]
        self.sizes = {name: size for name in blocks if (size := self._size(name + leaf))}

    @property
    def packed(self) -> bool:
        return self.coder is not None

    def levels(self, module: str) -> Tensor:
        """int16 [O, I]: integers of a packed weight relative to their zero points."""
        tensors = {key.rpartition(".")[2]: self._read(key) for key in self._places if key.rpartition(".")[0] == module}
        layer: QuantLinear = self.coder.decode(module, tensors, self.settings)
        zeros_OG = layer.grid().zero_OG
        groups_I = layer.g_idx.long()
        return layer.integers().short() - zeros_OG.short()[:, groups_I]

    def weight(self, module: str) -> Tensor:
        """float32 of a float weight."""
        return self._read(f"{module}.weight").float()

    def _read(self, key: str) -> Tensor:
        try:
            with safe_open(self._places[key], "pt") as stream:
                return stream.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise SqftError(f"the weights of {self.folder} cannot be read ({error})") from None

    def _size(self, key: str) -> int:
        """Weights in a tensor, from the file's header; 0 if it is no matrix (a norm, say)."""
        with safe_open(self._places[key], "pt") as stream:
            shape = stream.get_slice(key).get_shape()
        return shape[0] * shape[1] * 32 // (self.settings.bits if self.settings else 32) if len(shape) == 2 else 0


def chosen(sizes: dict[str, int], budget: int = BUDGET) -> list[str]:
    """Modules whose weights are within the budget, spread evenly over the model."""
    total = sum(sizes.values())
    if total <= budget:
        return list(sizes)
    names, share = list(sizes), budget / total
    return [name for i, name in enumerate(names) if int((i + 1) * share) > int(i * share)] or names[:1]


def count_levels(folder: WeightFolder, names: Sequence[str]) -> Histogram:
    """Counts of the integer levels of a packed folder; those of 8 bits in groups of nine."""
    counts = Histogram(of_modules=len(folder.sizes))
    width = 9 if folder.settings and folder.settings.bits == 8 else 1
    for name, mask in _with_masks(folder.folder, names):
        level_OI = folder.levels(name)
        zeros = int((level_OI == 0).sum())
        kept_zeros = _kept_zeros(level_OI, mask)
        counts.zeros[name] = (zeros, level_OI.numel())
        for value, number in enumerate(torch.bincount((level_OI + 256).flatten()).tolist(), -256):
            if number:
                counts.kept[float(round(value / width) * width)] += number if value else kept_zeros
        counts.pruned += zeros - kept_zeros
        counts.modules += 1
    return counts


def _kept_zeros(level_OI: Tensor, mask: Tensor | None) -> int:
    """Weights that are zero without having been pruned; all zeros, if the folder has no mask of this weight."""
    if mask is None:
        return int((level_OI == 0).sum())
    if mask.dtype == torch.int32:  # positions of kept zeros
        return mask.numel()
    return int(((level_OI == 0) & unpack_mask(mask, level_OI.shape[1])).sum())


def _with_masks(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor | None]]:
    """Each name with its stored mask, read when it is its turn."""
    file = folder / MASKS
    if not file.is_file():
        yield from ((name, None) for name in names)
        return
    try:
        with safe_open(file, "pt") as stream:
            known = set(stream.keys())
            for name in names:
                yield name, stream.get_tensor(name) if name in known else None
    except (OSError, SafetensorError) as error:
        raise SqftError(f"{file} is corrupt or truncated ({error})") from None


def moves(before: WeightFolder, after: WeightFolder, names: Sequence[str]) -> tuple[float, int]:
    """Of the weights that are not zero in both folders: the share with another integer, and the largest difference.

    A quarter of the modules is looked at.
    """
    changed = kept = farthest = 0
    for name in names[::4]:
        old, new = before.levels(name), after.levels(name)
        if old.shape == new.shape:
            difference = (old - new).abs()
            changed += int(torch.count_nonzero(difference))
            kept += int(((old != 0) | (new != 0)).sum())
            farthest = max(farthest, int(difference.max()))
    return changed / max(1, kept), farthest


def spread(folder: WeightFolder, names: Sequence[str]) -> float:
    """Four standard deviations of the weights that are not zero: the range of a histogram."""
    squares, number = 0.0, 0
    for name in list(names)[:: max(1, len(names) // 8)]:
        weight = folder.weight(name)
        squares += float(weight.double().square().sum())
        number += int(torch.count_nonzero(weight))
    return 4 * (squares / max(1, number)) ** 0.5 or 1.0


def count_values(folder: WeightFolder, names: Sequence[str], reach: float) -> Histogram:
    """Counts of the weights of a float folder in ``BINS`` ranges of [-reach, reach]; exact zeros count as pruned."""
    counts = Histogram(of_modules=len(folder.sizes))
    totals = torch.zeros(BINS, dtype=torch.float64)
    for name in names:
        weight = folder.weight(name)
        zeros = weight.numel() - int(torch.count_nonzero(weight))
        counts.zeros[name] = (zeros, weight.numel())
        inside = torch.histc(weight, BINS, -reach, reach).double()
        counts.beyond += weight.numel() - int(inside.sum())
        totals += inside
        totals[BINS // 2] -= zeros
        counts.pruned += zeros
        counts.modules += 1
    width = 2 * reach / BINS
    counts.kept = Counter({(i - BINS // 2) * width: int(n) for i, n in enumerate(totals.tolist())})
    return counts
