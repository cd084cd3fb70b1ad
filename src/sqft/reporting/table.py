"""Tables from manifests: what each stage of a run did, and what a folder of runs holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft import artifact
from sqft.errors import SqftError, UsageError
from sqft.measuring.size import human, weight_bytes
from sqft.models.dense import locate

STAGES = ("model", "sparsify", "quantize", "train", "search", "merge")
HEADER = (
    "stage", "accuracy (95 % interval)", "perplexity (95 %)", "sparsity", "zeros kept", "non-zero", "on disk", "took",
)  # fmt: skip


@dataclass
class Row:
    """One stage of a run; what was not measured is None."""

    stage: str
    accuracy: float | None = None
    accuracy_ci95: tuple[float, float] | None = None
    perplexity: float | None = None
    perplexity_ci95: tuple[float, float] | None = None
    sparsity: float | None = None
    zeros_kept: float | None = None
    nonzero: int | None = None
    size: int | None = None
    seconds: float | None = None


def run_rows(output: Path, model: str) -> list[Row]:
    """One row a stage folder of a run; 'model' is what the run started from."""
    rows = []
    for stage in STAGES:
        folder = output / stage
        row = Row(stage)
        if stage == "model":
            row.size = weight_bytes(model) if Path(model).exists() else None
            if Path(model).exists() and locate(model)[1]:
                row.stage = "model (a GGUF file)"
            if artifact.is_stage(output / "sparsify"):
                row.nonzero = artifact.read_manifest(output / "sparsify").metrics["parameters"]
        elif not artifact.is_stage(folder):
            continue
        else:
            metrics = artifact.read_manifest(folder).metrics
            row.sparsity, row.zeros_kept = metrics.get("sparsity"), metrics.get("zeros_kept")
            row.seconds = metrics.get("seconds")
            if "parameters" in metrics and "zeros" in metrics:
                row.nonzero = metrics["parameters"] - metrics["zeros"]
            row.size = weight_bytes(folder)
        evaluation = output / "evaluate" / stage
        if artifact.is_stage(evaluation):
            scores = artifact.read_manifest(evaluation).metrics
            for name in ("accuracy", "accuracy_ci95", "perplexity", "perplexity_ci95"):
                setattr(row, name, scores.get(name))
        rows.append(row)
    return rows


def cells(row: Row) -> tuple[str, ...]:
    """A row's texts, under HEADER. Shares are cut, not rounded up: 99.999 % never reads 100 %."""
    accuracy = perplexity = "-"
    if row.accuracy is not None and row.accuracy_ci95:
        low, high = row.accuracy_ci95
        accuracy = f"{row.accuracy:.1%} ({low:.1%} - {high:.1%})"
    if row.perplexity is not None and row.perplexity_ci95:
        low, high = row.perplexity_ci95
        perplexity = f"{row.perplexity:.2f} ({low:.2f} - {high:.2f})"
    return (
        row.stage, accuracy, perplexity, share(row.sparsity), share(row.zeros_kept),
        "-" if row.nonzero is None else f"{row.nonzero / 1e6:.1f} M",
        "-" if row.size is None else human(row.size), "-" if row.seconds is None else f"{row.seconds:.0f} s",
    )  # fmt: skip


def share(value: float | None) -> str:
    return "-" if value is None else f"{int(value * 1e5 + 1e-9) / 1e3:.3f} %"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """To standard output; when that is no terminal, as wide as needed."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, title=title or None)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def list_stages(root: Path) -> list[dict[str, Any]]:
    """Every stage folder under ``root``: path, stage, time, main numbers. Raises UsageError if there is none."""
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}")
    found = []
    for file in sorted(root.rglob(artifact.MANIFEST)):
        if any(part.startswith(".") for part in file.relative_to(root).parts[:-1]):
            continue
        try:
            manifest = artifact.read_manifest(file.parent)
        except SqftError as error:
            found.append({"folder": str(file.parent), "stage": "?", "created": "", "numbers": {"error": str(error)}})
            continue
        numbers = {k: v for k, v in manifest.metrics.items() if isinstance(v, (int, float))}
        found.append({"folder": str(file.parent), "stage": manifest.stage, "created": manifest.created,
                      "numbers": numbers})  # fmt: skip
    if not found:
        raise UsageError(f"no folder under {root} was written by sqft")
    return found


def summary(numbers: dict[str, Any]) -> str:
    """The few numbers that tell a stage folder's story, in one line."""
    shown = []
    for name in (
        "accuracy",
        "perplexity",
        "sparsity",
        "zeros_kept",
        "max_logit_difference",
        "loss",
        "eval_loss",
        "error",
    ):
        value = numbers.get(name)
        if value is None:
            continue
        if name in ("accuracy", "sparsity", "zeros_kept"):
            shown.append(f"{name.replace('_', ' ')} {share(value)}")
        else:
            shown.append(f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(shown)
