"""How far ``sqft inspect``'s and ``--dry-run``'s estimates of memory are from what stages hold: SmolLM2-135M and two models of
random weights (wide and of few blocks; narrow and of many, in bfloat16). Writes the part "estimates" of
benchmarks/results/scale.json.

    python benchmarks/bench_estimates.py [--models NAME ...] [--rows NAME ...] [--root FOLDER]
    python benchmarks/bench_estimates.py --markdown    # the table of docs/recipes.md

Held is a process's highest anonymous memory, and for stages that go through the whole model again and again (train, search,
evaluate) what lies in memory of the model's files besides: the system may drop that, and then has to read it each time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_memory import anonymous
from common import RESULTS, check, update_results
from transformers import LlamaConfig, LlamaForCausalLM

import sqft
from sqft.flags import written_flags
from sqft.planning.walk import Walk
from sqft.recipe import Step, resolve_model
from sqft.stages import STAGES

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LIMIT = 0.15
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {},
    "4 x 1024": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8,
                 "num_key_value_heads": 4, "dtype": "float32"},
    "24 x 512, bfloat16": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 8,
                           "num_key_value_heads": 2, "dtype": "bfloat16"},
}  # fmt: skip
TOKENS = {"calibration": "builtin", "samples": 8, "length": 256}
TRAIN = {"task": "arc_easy", "data_dir": str(DATA), "limit": 64, "max_steps": 2, "batch_size": 8, "gradient_accumulation": 1,
         "eval_limit": 0, "completion_only": False}  # fmt: skip
CHOICES = {"task": "arc_easy", "data_dir": str(DATA), "split": "validation", "limit": 32, "batch_size": 32}
# Name: stage, what it is made from, options.
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sparsify": ("sparsify", "dense", TOKENS),
    "sparsify, repaired": ("sparsify", "dense", {**TOKENS, "repair": "layer"}),
    "quantize": ("quantize", "sparsify", TOKENS),
    "quantize, repaired": ("quantize", "sparsify", {**TOKENS, "repair": "layer"}),
    "train": ("train", "sparsify", TRAIN),
    "train, checkpointing": ("train", "sparsify", {**TRAIN, "gradient_checkpointing": True}),
    "train, teacher": ("train", "sparsify", {**TRAIN, "distill": "dense", "distill_tokens": "all"}),
    "train, kept weights": ("train", "sparsify", {**TRAIN, "adapter": "sparse-full"}),
    "train, INT4": ("train", "quantize", {**TRAIN, "adapter": "qa-sparse-peft"}),
    "train, elastic": ("train", "sparsify", {**TRAIN, "search_space": [16, 8]}),
    "search": ("search", "train, elastic", {**CHOICES, "limit": 16, "strategy": "median"}),
    "merge": ("merge", "train", {}),
    "merge, INT4": ("merge", "train, INT4", {}),
    "evaluate, choices": ("evaluate", "merge", CHOICES),
    "evaluate, text": ("evaluate", "merge", {"text": "builtin", "length": 512, "max_tokens": 2048}),
    "evaluate, written": ("evaluate", "merge", {"task": "arithmetic", "limit": 16, "batch_size": 16}),
    "evaluate, INT4": ("evaluate", "merge, INT4", CHOICES),
    "evaluate, an adapter": ("evaluate", "train", CHOICES),
}  # fmt: skip
MAPPED = ("train", "search", "evaluate")


def mapped(process: int) -> int:
    """Bytes in memory of the weights' files that a process has mapped; 0 when it has ended."""
    found, ours = 0, False
    try:
        for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
            if "-" in line.split(" ", 1)[0] and not line.startswith(("Vm", "Rss")):
                ours = line.endswith((".safetensors", ".gguf"))
            elif ours and line.startswith("Rss:"):
                found += int(line.split()[1]) * 1024
    except OSError:
        return 0
    return found


def held(step: Step) -> int:
    """The most bytes that the stage's command line holds."""
    out = [] if step.stage == "evaluate" else [str(step.folder)]
    command = [sys.executable, "-m", "sqft", step.stage, step.source, *out, *written_flags(step.config)]
    highest, files = 0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for turn in itertools.count():
            if process.poll() is not None:
                break
            highest = max(highest, anonymous(process.pid))
            if step.stage in MAPPED and turn % 50 == 0:  # takes longer
                files = max(files, mapped(process.pid))
            time.sleep(0.02)
        assert process.returncode == 0, process.stderr and process.stderr.read()
    return highest + files


def step_of(row: str, root: Path) -> Step:
    stage, source, options = ROWS[row]
    if options.get("distill"):
        options = {**options, "distill": str(root / options["distill"])}
    return Step(row, stage, STAGES[stage].config(**options), str(folder(root, source)), folder(root, row))


def folder(root: Path, row: str) -> Path:
    return root / row.replace(",", "").replace(" ", "-")


def expected(row: str, root: Path) -> int:
    """Bytes, by the estimate."""
    walk, chain = Walk(str(root / "dense")), [row]
    while (before := ROWS[chain[0]][1]) != "dense":
        chain.insert(0, before)
    return int([walk.take(step_of(each, root)) for each in chain][-1]["memory_bytes"])


def dense(name: str, out: Path) -> None:
    """The un-compressed model of a shape."""
    if out.is_dir():
        return
    source = resolve_model("demo-model")
    live, tokenizer = sqft.load(source)
    if SHAPES[name]:
        sizes = {**SHAPES[name], "vocab_size": live.config.vocab_size, "tie_word_embeddings": True}
        live = LlamaForCausalLM(LlamaConfig(**sizes)).to(getattr(torch, sizes["dtype"]))
    sqft.save(live, tokenizer, out)


def markdown() -> str:
    found = json.loads((RESULTS / "scale.json").read_text())["results"]["estimates"]["bytes"]
    names = list(found)
    rows = dict.fromkeys(row for name in names for row in found[name])

    def cell(name: str, row: str) -> str:
        if row not in found[name]:
            return ""
        held, expected = found[name][row]
        return f"{held / 1e6:.0f} MB, {expected / held:.2f}"

    return "\n".join([f"| held, estimate / held | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|",
                      *(f"| {row} | " + " | ".join(cell(name, row) for name in names) + " |" for row in rows)])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--root", type=Path, default=Path("runs") / "bench-estimates")
    parser.add_argument("--keep", action="store_true", help="measure only what the last results lack, and estimate all")
    parser.add_argument("--markdown", action="store_true", help="print the table of the last run")
    given = parser.parse_args()
    if given.markdown:
        print(markdown())
        return
    results = json.loads((RESULTS / "scale.json").read_text())["results"]
    found: dict[str, dict[str, list[int]]] = results.get("estimates", {}).get("bytes", {}) if given.keep else {}
    for name in given.models:
        root = given.root / name.replace(",", "").replace(" ", "-")
        dense(name, root / "dense")
        found.setdefault(name, {})
        for row in given.rows:
            if row in found[name]:
                found[name][row][1] = expected(row, root)
                continue
            shutil.rmtree(folder(root, row), ignore_errors=True)
            found[name][row] = [held(step_of(row, root)), expected(row, root)]
            print(
                f"{name}: {row}: {found[name][row][0] / 1e6:.0f} MB held, {found[name][row][1] / 1e6:.0f} expected",
                flush=True,
            )
    found = {name: {row: rows[row] for row in ROWS if row in rows} for name, rows in found.items()}
    checks = [check(f"estimates: {name}, {row}: |expected / held - 1|", abs(expected / held - 1), LIMIT)
              for name, rows in found.items() for row, (held, expected) in rows.items()]  # fmt: skip
    update_results("scale", "estimates", {"bytes": found}, checks)


if __name__ == "__main__":
    main()
