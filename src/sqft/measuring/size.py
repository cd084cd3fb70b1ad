"""Size of a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqft.keys import FRACTIONS, MASKS


def weight_bytes(folder: str | Path) -> int:
    """Bytes on disk of all weights, masks and GGUF files in a folder, or of one file."""
    path = Path(folder)
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.suffix in (".safetensors", ".gguf"))


def serving_bytes(folder: str | Path) -> int:
    """Bytes on disk of the weights that have to be there to answer: ``weight_bytes`` without masks and
    fractions."""
    path = Path(folder)
    beside = (path / MASKS, path / FRACTIONS)
    return weight_bytes(path) - sum(file.stat().st_size for file in beside if file.is_file())


def of_half(size: int | None, parameters: Any) -> float | None:
    """A size beside that of so many weights in 16 bits, which is what people start from; None: one is not known."""
    known = size and isinstance(parameters, (int, float)) and parameters > 0
    return size / (2 * parameters) if size and known else None


def with_share(folder: str | Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A stage folder's metrics, and how large it is beside the dense model in 16 bits."""
    return {**metrics, "size of dense float16": of_half(serving_bytes(folder), metrics.get("parameters"))}


def human(size: float) -> str:
    """1234567 -> '1.2 MB' (decimal units)."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
