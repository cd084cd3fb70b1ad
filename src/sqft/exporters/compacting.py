"""``sqft.pack`` and ``sqft.unpack``: a sparse model folder in compact form, and back, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqft import artifact
from sqft.deployment import PackConfig, UnpackConfig
from sqft.errors import UsageError
from sqft.formats.compact import CompactReader, is_compact, pack_folder, unpack_folder
from sqft.models.reader import SafetensorsReader


def pack(folder: str | Path, config: PackConfig | None = None, *, out: str | Path,
         overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Writes a sparse model folder, float or INT, in compact form: a bit a weight, and the weights that are not pruned.

    Returns the metrics (bytes before and after). Raises UsageError for an adapter or a folder that is compact,
    SqftError for one that cannot be read or has no weight that would be smaller, VerificationError unless what was
    written is the model, bit for bit.
    """
    with artifact.stage("pack", config, out, folder, overwrite=overwrite) as made:
        source = _model(folder)
        if is_compact(folder):
            raise UsageError(f"{folder} is compact already")
        made.metrics.update(modules=pack_folder(source, made.folder), **_sizes(folder, made.folder))
    return made.metrics


def unpack(folder: str | Path, config: UnpackConfig | None = None, *, out: str | Path,
           overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Writes the model folder of which ``folder`` is the compact form. Returns the metrics; raises as ``pack`` does."""
    with artifact.stage("unpack", config, out, folder, overwrite=overwrite) as made:
        _model(folder)
        if not is_compact(folder):
            raise UsageError(f"{folder} is not compact: there is nothing to unpack")
        unpack_folder(CompactReader(folder), made.folder)
        made.metrics.update(_sizes(folder, made.folder))
    return made.metrics


def _sizes(before: str | Path, after: Path) -> dict[str, int]:
    """Bytes of weights and masks."""
    sizes = [sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) for folder in (before, after)]
    return {"bytes_before": sizes[0], "bytes": sizes[1]}


def _model(folder: str | Path) -> SafetensorsReader:
    if not Path(folder).is_dir():
        raise UsageError(f"{folder} is not a folder: only a model on this disk is packed")
    if (Path(folder) / "adapter_config.json").is_file():
        raise UsageError(f"{folder} is an adapter: merge it first (sqft merge)")
    return SafetensorsReader(folder)
