"""The table of ``--dry-run``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqft.measuring.size import human
from sqft.reporting.table import print_table

HEADER = ("stage", "of", "state", "time", "memory", "on disk", "options that are not the default")


def show(plan: Any, quiet: bool = False) -> dict[str, Any]:
    """A plan as plain data, and printed unless ``quiet``."""
    found = dataclasses.asdict(plan)
    if not quiet:
        print_table(HEADER, [cells(step) for step in found["steps"]])
        print("\n".join(footer(found)))
    return found


def cells(step: Mapping[str, Any]) -> tuple[str, ...]:
    """A step's texts, under HEADER."""
    state = f"{step['state']}: {step['note']}" if step["note"] else step["state"]
    options = ", ".join(f"{key}={_text(value)}" for key, value in step["options"].items())
    sizes = ("-" if step[key] is None else human(step[key]) for key in ("memory_bytes", "disk_bytes"))
    return (step["name"], Path(step["parent"]).name, state, duration(step["seconds"]), *sizes, options or "-")


def footer(plan: Mapping[str, Any]) -> list[str]:
    """Lines below the table: the model, the sum, what it was reckoned with, and how far that may be off."""
    lines = list(plan["notes"])
    if plan["parameters"]:
        lines.append(f"{plan['model']}: {plan['parameters'] / 1e6:.1f} M parameters, {human(plan['weight_bytes'])}")
    if plan["seconds"] is not None:
        lines.append(f"All that is not skipped: about {duration(plan['seconds'])}")
    speed = plan["speed"]
    if speed:
        lines.append(
            f"Estimates: FLOPs and bytes over what was measured here ({speed['device']}: {speed['products'] / 1e9:.0f} "
            f"GFLOP/s, {speed['fast'] / 1e9:.0f} by the fastest library, {speed['moved'] / 1e9:.0f} GB/s); on "
            f"SmolLM2-135M right within a factor of {plan['factor']:g}. Formulas: docs/recipes.md"
        )
    return lines


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
