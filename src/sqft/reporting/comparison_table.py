"""The table of a comparison, with the paper's columns and what serving costs; and the differences of two runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sqft import artifact
from sqft.errors import SqftError, UsageError
from sqft.measuring.size import human
from sqft.reporting.table import share

RESULT = "compare.json"
HEADER = (
    "method", "sparsity", "mergeable", "final precision", "accuracy (95 % interval)", "minus reference (95 %)",
    "sparsity kept", "on disk", "trained weights", "training", "peak memory", "decode", "folder",
)  # fmt: skip


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row's texts, under HEADER; '-' for what is not there."""

    def text(key: str, form: Any) -> str:
        return "-" if row.get(key) is None else form(row[key])

    accuracy = text("accuracy", lambda value: f"{value:.1%}")
    if row.get("accuracy_ci95"):
        low, high = row["accuracy_ci95"]
        accuracy += f" ({low:.1%} to {high:.1%})"
    return (
        row["method"], text("sparsity", lambda value: f"{value:.0%}"),
        text("mergeable", lambda value: "yes" if value else "no"), text("precision", str), accuracy,
        text("difference_ci95", lambda value: f"{value[0]:+.1%} to {value[1]:+.1%}"), text("sparsity_kept", share),
        text("size", human), text("trainable_parameters", lambda value: f"{value / 1e6:.2f} M"),
        text("train_seconds", lambda value: f"{value / 60:.1f} min"), text("train_peak_bytes", human),
        text("decode_tokens_per_second", lambda value: f"{value:.1f} tokens/s"), text("folder", str),
    )  # fmt: skip


def difference(left: Path, right: Path) -> list[tuple[str, str, str, str]]:
    """What differs between two runs: (stage folder, option or number, left, right), stage by stage.

    Times, versions that are equal and texts longer than a line are left out. Raises UsageError for a folder without
    stages.
    """
    ours, theirs = _stages(left), _stages(right)
    rows: list[tuple[str, str, str, str]] = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            rows.append((name, "stage", "there" if name in ours else "-", "there" if name in theirs else "-"))
            continue
        a, b = _flat(ours[name]), _flat(theirs[name])
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                rows.append((name, key, _short(a.get(key)), _short(b.get(key))))
    return rows


def _stages(root: Path) -> dict[str, dict[str, Any]]:
    """Config, metrics and versions of each stage folder below a run, by its relative name ('.' is the run)."""
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}")
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(root.rglob(artifact.MANIFEST)):
        name = file.parent.relative_to(root).as_posix()
        if any(part.startswith(".") and part != "." for part in name.split("/")):
            continue
        try:
            manifest = artifact.read_manifest(file.parent)
        except SqftError as error:
            found[name] = {"error": str(error)}
            continue
        found[name] = {"option": manifest.config, "number": manifest.metrics, "version": manifest.versions}
    if not found:
        raise UsageError(f"no folder under {root} was written by sqft")
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return dict(_pairs(values, prefix))


def _pairs(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _pairs(value, f"{name} " if not prefix else f"{name}.")
        elif key != "seconds":
            yield name, value


def _short(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
