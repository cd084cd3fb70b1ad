"""Real models by the complete command line: perplexity and a task after each stage. Every row is a command of ``COMMANDS``,
run as a user would; what is there is skipped.

    python benchmarks/bench_cli.py [--model demo-model | FILE.gguf] [--limit 640] [--score-limit 1000] [--bfloat16]
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, check, machine, update_results

from sqft.artifact import read_manifest
from sqft.recipe import DEMO_MODEL, resolve_model

# On a CPU with a matrix unit: products in bfloat16; torch's backward of attention in it is slow.
BFLOAT16 = {"train": " --precision bfloat16 --attention eager", "evaluate": " --dtype bfloat16"}
CALIBRATION = "--calibration arc_easy+{c4} --data-dir {data} --samples 32 --repair layer"
TRAINING = "--task arc_easy --data-dir {data} --limit {limit} --epochs 1 --batch-size 4 --gradient-accumulation 4 --no-completion-only"
# What a stage makes: its command, and whether it is scored. FROM and OUT are folders.
COMMANDS = {
    "50 %": (f"sparsify {{model}} OUT --sparsity 0.5 {CALIBRATION}", True),
    "32:64": (f"sparsify {{model}} OUT --pattern 32:64 {CALIBRATION}", True),
    "2:4": (f"sparsify {{model}} OUT --pattern 2:4 {CALIBRATION}", True),
    "50 %, INT4": (f"quantize 50-% OUT --keep-fractions {CALIBRATION}", True),
    "50 %, adapter": (f"train 50-% OUT --target-modules all --train-norms --learning-rate 1e-3 {TRAINING}", False),
    "50 %, adapted and merged": ("merge 50-%-adapter OUT", True),
    "50 %, INT4, adapter": (f"train 50-%-INT4 OUT --adapter qa-sparse-peft --target-modules all {TRAINING}", False),
    "50 %, INT4, adapted and merged": ("merge 50-%-INT4-adapter OUT", True),
}
SCORE = (
    "evaluate FROM --out OUT --task arc_easy --data-dir {data} --split test --limit {problems} --batch-size 64 "
    "--text {data}/wikitext2_tokens/test.jsonl --max-tokens 8192"
)


def folder(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def sqft(command: str, root: Path, values: dict[str, Any], out: Path) -> dict[str, Any]:
    """Runs a command line below ``root`` unless its output is there; the metrics of the output."""
    if not (out / "sqft.json").is_file():
        words = [word.format(**values) for word in shlex.split(command)]
        print("sqft", *words, flush=True)
        subprocess.run([sys.executable, "-m", "sqft", *words], check=True, cwd=root)
    return read_manifest(out).metrics


def markdown() -> str:
    """The table of docs/results."""
    lines = []
    for part, found in json.loads((RESULTS / "cli.json").read_text())["results"].items():
        lines += [f"| {part} | perplexity | ARC-Easy (95 % interval) | sparsity | zeros kept | seconds |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for name, row in found["rows"].items():
            low, high = row["interval"]
            pruned, kept = (f"{row[key]:.1%}" if key in row else "" for key in ("sparsity", "zeros_kept"))
            lines.append(f"| {name} | {row['perplexity']:.2f} | {row['accuracy']:.1%} ({low:.1%} to {high:.1%}) | {pruned} | "
                         f"{kept} | {row.get('seconds', 0):.0f} |")  # fmt: skip
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--data-dir", type=Path, default=data)
    parser.add_argument("--limit", type=int, default=640, help="use the first N training problems")
    parser.add_argument("--score-limit", type=int, default=1000, help="score the first N problems")
    parser.add_argument("--bfloat16", action="store_true", help="train and score with bfloat16 products")
    parser.add_argument(
        "--rows", nargs="+", help="some rows of COMMANDS, in their order; others stay as they were; default: all"
    )
    parser.add_argument("--root", type=Path, default=Path("runs") / "bench-cli")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the last runs")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown())
        return
    demo = arguments.model == DEMO_MODEL
    model = str(Path(resolve_model(arguments.model)).resolve())
    name = "SmolLM2-135M" if demo else Path(model).stem
    root = (arguments.root / name).resolve()
    root.mkdir(parents=True, exist_ok=True)
    data = arguments.data_dir.resolve()
    values = {"model": model, "data": data, "c4": data / "calibration" / "c4.jsonl", "limit": arguments.limit,
              "problems": arguments.score_limit}  # fmt: skip
    faster = BFLOAT16 if arguments.bfloat16 else {}
    rows: dict[str, dict[str, Any]] = {}
    for row, (command, scored) in {"dense": ("", True), **COMMANDS}.items():
        if arguments.rows and row not in arguments.rows:
            continue
        out = root / folder(row)
        command += faster.get(command.split(" ")[0], "")
        made = sqft(command.replace("OUT", out.name), root, values, out) if command else {}
        if scored:
            source, scores = out.name if command else model, f"scores/{out.name}"
            score = SCORE.replace("FROM", source).replace("OUT", scores) + faster.get("evaluate", "")
            found = sqft(score, root, values, root / scores)
            told = ("sparsity", "zeros_kept", "seconds", "max_logit_difference")
            rows[row] = {"accuracy": found["accuracy"], "interval": found["accuracy_ci95"], "perplexity": found["perplexity"],
                         **{key: made[key] for key in told if key in made}}  # fmt: skip
    print(json.dumps(rows, indent=1))
    before = json.loads((RESULTS / "cli.json").read_text())["results"].get(name, {}).get("rows", {})
    here = {row: found | {"instructions": machine()["instructions"]} for row, found in rows.items()}
    rows = {row: {**before, **here}[row] for row in ("dense", *COMMANDS) if row in {**before, **here}}
    checks = [check(f"{name}: {row}: zeros kept", found["zeros_kept"], 1.0, at_most=False)
              for row, found in rows.items() if "zeros_kept" in found]  # fmt: skip
    update_results("cli", name, {"rows": rows}, checks)


if __name__ == "__main__":
    main()
