"""``sqft verify``: whether a stage folder is what was written, and what it says of itself is so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sqft import artifact
from sqft.artifact import Manifest
from sqft.errors import SqftError, UsageError
from sqft.folders import base_of, is_adapter, load
from sqft.formats.checkpoint import packed_layers
from sqft.models.weights import linear_weights
from sqft.probe import check_probe, logits, sample_tokens
from sqft.quantization.linear import QuantLinear
from sqft.sparsity.masks import ZeroCounts

_LOADED = ("sparsify", "quantize", "train", "search", "extract", "merge", "pack", "unpack", "save")


def verify_folder(folder: str | Path, deep: bool = False) -> list[dict[str, Any]]:
    """Checks a stage folder; ``deep``: and all that it was made from, as far as that is here.

    Of each: the manifest, every file's SHA-256, and, if these are whole, what is in them: every weight is finite, every
    pruned weight is 0, integers and zero points are on the grid, and an adapter computes on its base what it did when
    it was trained. Returns a row a folder: ``folder``, ``stage``, ``problems`` (a list of sentences that say how to
    repair them), ``checked``. Raises UsageError for a folder that sqft did not write.
    """
    if not artifact.is_stage(folder):
        raise UsageError(f"{folder} has no {artifact.MANIFEST}: it was not written by sqft")
    rows, waiting = {}, [str(folder)]
    while waiting:
        each = waiting.pop(0)
        if each not in rows:
            rows[each], parents = _row(Path(each), deep)
            waiting += parents if deep else []
    return list(rows.values())


def _row(folder: Path, deep: bool) -> tuple[dict[str, Any], list[str]]:
    """A folder's row, and the stage folders that it was made from."""
    row: dict[str, Any] = {"folder": str(folder), "stage": "?", "problems": [], "checked": "manifest"}
    try:
        manifest = artifact.read_manifest(folder)
    except SqftError as error:
        return row | {"problems": [str(error)]}, []
    again = f"run its stage ('{manifest.stage}') again, or take it as it is: sqft verify {folder} --accept"
    problems = [f"{problem}: {again}" for problem in artifact.damaged(folder, manifest)]
    parents, changed = _parents(folder, manifest)
    row |= {"stage": manifest.stage, "checked": f"{len(manifest.files)} files"}
    if not problems and manifest.stage in _LOADED:
        try:
            checked, found = _contents(folder)
            row["checked"] += f", {checked}"
            problems += [f"{problem}: run its stage ('{manifest.stage}') again" for problem in found]
        except (SqftError, UsageError) as error:
            problems.append(str(error))
    return row | {"problems": problems + (changed if deep else [])}, parents


def _parents(folder: Path, manifest: Manifest) -> tuple[list[str], list[str]]:
    """The stage folders that one was made from, and what is wrong with what it was made from."""
    found, problems = [], []
    for named, key in ((manifest.parent, manifest.parent_key), (manifest.base, manifest.base_key)):
        path = artifact.resolve_parent(folder, named) if named else ""
        if not path or not Path(path).exists():
            if path.startswith("."):
                problems.append(f"{folder} was made from {path}, which is gone: it cannot be checked")
            continue
        try:
            if artifact.folder_key(path) != key:
                problems.append(f"{path} is not what {folder} was made from (it has changed since): run the stage "
                                f"('{manifest.stage}') again, or restore it")  # fmt: skip
        except SqftError:  # its own row says so
            pass
        if artifact.is_stage(path):
            found.append(path)
    return found, problems


@torch.no_grad()
def _contents(folder: Path) -> tuple[str, list[str]]:
    """What was checked of a model or adapter, and what is wrong with it. Raises SqftError if it cannot be loaded."""
    if is_adapter(folder):
        base_of(folder)
        model, tokenizer = load(folder)
        check_probe(logits(model, sample_tokens(model, tokenizer)), folder)
        values = {name: p for name, p in model.named_parameters() if ".lora_" in name}
        wrong = [f"{name} is not finite" for name, p in values.items() if not bool(p.isfinite().all())]
        return f"{len(values)} tensors of the adapter, its probe on its base", wrong
    model, _ = load(folder)
    problems, counts = [], ZeroCounts()
    for weight in linear_weights(model):
        filled = counts.filled
        counts.add(weight)
        if counts.filled > filled:
            problems.append(f"{counts.filled - filled} pruned weights of {weight.name} are not zero")
    for name, layer in packed_layers(model).items():
        problems += [f"{what} of {name}" for what in _off_grid(layer)]
    problems += [f"{name} is not finite" for name, p in model.named_parameters()
                 if p.is_floating_point() and not bool(p.isfinite().all())]  # fmt: skip
    grid = f", the grids of {len(packed_layers(model))} layers" if packed_layers(model) else ""
    return f"{counts.weights} weights, of which {counts.pruned} pruned ones are zero{grid}", problems


def _off_grid(layer: QuantLinear) -> Iterator[str]:
    grid = layer.grid()
    if not bool(grid.scale_OG.isfinite().all()):
        yield "a scale is not finite"
    zero = grid.zero_OG
    if bool(((zero < 0) | (zero >= 2**layer.bits)).any()) or not bool((zero == zero.round()).all()):
        yield "a zero point is off the grid"
