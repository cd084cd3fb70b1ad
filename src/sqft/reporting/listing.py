"""``sqft ls`` and ``sqft compare RUN RUN``: what manifests say, without loading anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sqft.errors import SqftError
from sqft.measuring.size import with_share
from sqft.reporting.collect import manifests
from sqft.reporting.tables import Column, Table, share

TOLD = {"accuracy": share, "perplexity": "{:.4g}".format, "sparsity": share, "zeros_kept": share,
        "max_logit_difference": "{:.4g}".format, "loss": "{:.4g}".format, "eval_loss": "{:.4g}".format,
        "size of dense float16": "{:.2f}".format,
        "error": str}  # fmt: skip


def stages_table(root: Path) -> Table:
    """Every stage folder under ``root``: path, stage, time, main numbers. Raises UsageError if there is none."""
    rows = [{"folder": str(folder), "stage": "?", "created": "", "numbers": {"error": str(manifest)}}
            if isinstance(manifest, SqftError) else
            {"folder": str(folder), "stage": manifest.stage, "created": manifest.created,
             "numbers": {key: value for key, value in with_share(folder, manifest.metrics).items()
                         if isinstance(value, (int, float))}}
            for folder, manifest in manifests(root)]  # fmt: skip
    columns = (Column("folder", "folder"), Column("stage", "stage"), Column("written", "created"),
               Column("numbers", "numbers", _summary))  # fmt: skip
    return Table(columns, rows)


def _summary(values: Mapping[str, Any]) -> str:
    """The few numbers that tell a stage folder's story, in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {text(values[name])}" for name, text in TOLD.items() if name in values)


def difference(left: Path, right: Path) -> Table:
    """What differs between two runs, stage by stage: rows of stage, name (of an option or number), left and right.
    Times, and versions that are equal, are left out. Raises UsageError for a folder without stages."""
    ours, theirs = _stages(left), _stages(right)
    rows = []
    for stage in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(stage), theirs.get(stage)
        if a is None or b is None:
            a, b = ({} if run is None else {"stage": "there"} for run in (a, b))
        rows += [{"stage": stage, "name": key, "left": _short(a.get(key)), "right": _short(b.get(key))}
                 for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]  # fmt: skip
    columns = ("stage", "stage"), ("option or number", "name"), (str(left), "left"), (str(right), "right")
    return Table([Column(*names) for names in columns], rows)


def _stages(root: Path) -> dict[str, dict[str, Any]]:
    """Config, metrics and versions of each stage folder below a run, by its relative name ('.' is the run)."""
    return {folder.relative_to(root).as_posix(): dict(_pairs({"error": str(manifest)} if isinstance(manifest, SqftError)
            else {"option": manifest.config, "number": manifest.metrics, "version": manifest.versions}, ""))
            for folder, manifest in manifests(root)}  # fmt: skip


def _pairs(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _pairs(value, f"{prefix}{key}." if prefix else f"{key} ")
        elif key != "seconds":
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    text = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
