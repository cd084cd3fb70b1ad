"""One model, three tasks, one after the other: after each round of ``sqft train`` and ``sqft merge`` the merged model is the
next round's base. What each round gives its task, what it takes from the others, and that zeros and grid are the first model's.

    python benchmarks/bench_rounds.py SPARSE-FLOAT SPARSE-INT4 [--limit 320] [--score-limit 300] [--bfloat16]

The models are folders, those of ``bench_cli.py`` say. What is there is skipped, what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, check, update_results

import sqft
from sqft.artifact import read_manifest
from sqft.models.reader import SafetensorsReader, same_bits
from sqft.recipe import run_stage
from sqft.sparsity.masks import collect_masks

ROUNDS = ("arc_easy", "piqa", "arithmetic")
SPLITS = {"arc_easy": "test", "piqa": "validation", "arithmetic": "test"}  # PIQA's test split has no public answers
# As in the recipes again and again-int4.
FLOAT = {"adapter": "sparse-peft", "target_modules": ["all"], "train_norms": True, "learning_rate": 1e-3}
PACKED = {"adapter": "qa-sparse-peft", "target_modules": ["all"]}
TRAIN = {"epochs": 1.0, "batch_size": 4, "gradient_accumulation": 4, "completion_only": False}
MATRIX_UNIT = {"precision": "bfloat16", "attention": "eager"}


def scores(folder: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy on each task with its interval, and perplexity, of the model in ``folder``."""
    shared: dict[str, Any] = {"batch_size": 64, "dtype": "bfloat16" if options.bfloat16 else "auto"}
    found: dict[str, Any] = {}
    for task in ROUNDS:
        limit = min(options.score_limit, 120) if task == "arithmetic" else options.score_limit
        config = sqft.EvaluateConfig(
            task=task, split=SPLITS[task], limit=limit, data_dir=_data(task, options), **shared
        )
        metrics = run_stage("evaluate", config, str(folder), out / task, print)
        found[task] = {"accuracy": metrics["accuracy"], "interval": metrics["accuracy_ci95"]}
    text = str(options.data_dir / "wikitext2_tokens" / "test.jsonl")
    config = sqft.EvaluateConfig(text=text, max_tokens=8192, **shared)
    found["perplexity"] = run_stage("evaluate", config, str(folder), out / "text", print)["perplexity"]
    return found


def _data(task: str, options: argparse.Namespace) -> str | None:
    return None if task == "arithmetic" else str(options.data_dir)  # which makes its problems


def compared(first: Path, now: Path) -> dict[str, Any]:
    """Of a round's model against the first one: pruned weights that are still zero, masks, and tensors of the grid."""
    before, after = SafetensorsReader(first), SafetensorsReader(now)
    grid = [name for name in before.layout if name.endswith(("_scale", "_zero_point", "scales", "qzeros"))]
    changed = sum(not same_bits(before.get(name), after.get(name)) for name in grid)
    masks, others = (collect_masks(sqft.load(folder)[0]) for folder in (first, now))  # of INT files hold them otherwise
    same_masks = masks.keys() == others.keys() and all(masks[name].equal(others[name]) for name in masks)
    return {"zeros_kept": read_manifest(now).metrics["zeros_kept"], "same_masks": same_masks,
            "grid_tensors": len(grid), "grid_tensors_changed": changed}  # fmt: skip


def rounds(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the model as it is, and one a round."""
    root = options.root / model.resolve().parent.name / model.name
    packed = bool(read_manifest(model).metrics.get("bits"))
    rows: list[dict[str, Any]] = [{"after": "-", **scores(model, root / "0" / "scores", options)}]
    base = model
    for number, task in enumerate(ROUNDS, start=1):
        folder = root / str(number)
        config = sqft.TrainConfig(**{**TRAIN, **(PACKED if packed else FLOAT), "task": task, "limit": options.limit,
                                     "data_dir": _data(task, options), **(MATRIX_UNIT if options.bfloat16 else {})})  # fmt: skip
        run_stage("train", config, str(base), folder / "adapter", print)
        merged = run_stage("merge", sqft.MergeConfig(), str(folder / "adapter"), folder / "merged", print)
        base = folder / "merged"
        rows.append({"after": task, **scores(base, folder / "scores", options), **compared(model, base),
                     "max_logit_difference": merged["max_logit_difference"]})  # fmt: skip
    return rows


def markdown() -> str:
    """The tables of docs/results."""
    lines = []
    for part, found in json.loads((RESULTS / "rounds.json").read_text())["results"].items():
        lines += [f"| {part}, after | ARC-Easy | PIQA | arithmetic | perplexity | zeros kept | same masks | grid tensors changed |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in found["rows"]:
            cells = [
                f"{row[task]['accuracy']:.1%} ({row[task]['interval'][0]:.1%} to {row[task]['interval'][1]:.1%})"
                for task in ROUNDS
            ]
            kept = [f"{row['zeros_kept']:.1%}", "yes" if row["same_masks"] else "NO",
                    f"{row['grid_tensors_changed']} of {row['grid_tensors']}"] if "zeros_kept" in row else ["", "", ""]  # fmt: skip
            lines.append(f"| {' | '.join([row['after'], *cells, format(row['perplexity'], '.2f'), *kept])} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="folders of sparse models, float or INT")
    parser.add_argument("--data-dir", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--limit", type=int, default=320, help="use the first N training problems of each task")
    parser.add_argument("--score-limit", type=int, default=300, help="score the first N problems of each task")
    parser.add_argument("--bfloat16", action="store_true", help="train and score with bfloat16 products")
    parser.add_argument("--root", type=Path, default=Path("runs") / "bench-rounds")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the last runs")
    options = parser.parse_args()
    for model in options.models:
        part = f"{model.resolve().parent.name}, {model.name}"
        rows = rounds(model, options)
        checks = [check(f"{part}: after {row['after']}: {what}", value, limit, at_most)
                  for row in rows[1:]
                  for what, value, limit, at_most in (
                      ("zeros kept", row["zeros_kept"], 1.0, False),
                      ("tensors of the grid that changed", row["grid_tensors_changed"], 0, True))]  # fmt: skip
        update_results("rounds", part, {"rows": rows}, checks)
    print(markdown())


if __name__ == "__main__":
    main()
