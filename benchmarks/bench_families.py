"""Every model type through all stages on a pico model: pruned to 50 %, 2:4 and 32:64, quantized, adapted by five kinds,
searched, merged in float and INT4, reloaded, generated from; and the sparsity reported beside the zeros counted. What
cannot be made here (Gemma 3n without timm) keeps its last row.

    python benchmarks/bench_families.py [--only TYPE ... | --only] [--markdown]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, check, write_results
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from pico import FAMILIES, MORE, here
from support.families import go_through, tokens

import sqft
from sqft.errors import first_line

EXAMPLES = [sqft.Example(f"Q: {i} plus {i}?\nA:", f" {2 * i}", str(2 * i)) for i in range(40)]


def row_of(family: str) -> dict[str, Any]:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = go_through(family, Path(folder), tokens(), EXAMPLES)
        except Exception as error:  # a family that fails is a row that says so
            found = {"error": f"{type(error).__name__}: {first_line(error)}"}
    return {**found, "seconds": time.perf_counter() - started}


def inspected() -> dict[str, float]:
    """Seconds of ``sqft inspect`` of a configuration of 70 B parameters, and of importing transformers' Llama alone."""
    timed = {}
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                    num_key_value_heads=8, vocab_size=128256, dtype="bfloat16").save_pretrained(folder)  # fmt: skip
        for name, words in {"inspect": ["-m", "sqft", "inspect", folder],
                            "imports": ["-c", "import transformers.models.llama.modeling_llama"]}.items():  # fmt: skip
            times = []
            for _ in range(4):  # the first warms the disk's cache
                started = time.perf_counter()
                subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
                times.append(time.perf_counter() - started)
            timed[name] = median(times[1:])
    return timed


def markdown() -> str:
    """The table of docs/families.md."""
    rows = json.loads((RESULTS / "families.json").read_text())["results"]["rows"]
    lines = ["| model type | blocks at | weights a block | layers | all stages |", "|---|---|---|---|---|"]
    for name, row in sorted(rows.items()):
        if "error" in row:
            lines.append(f"| {name} | | | | {row['error']} |")
            continue
        counts = "/".join(map(str, dict.fromkeys(row["weights"])))
        notes = {"convolutions": "convolutions kept", "experts": "experts", "sees": "sees"}
        layers = ", ".join([*row["layers"], *(note for key, note in notes.items() if row[key])])
        lines.append(f"| {name} | `{row['blocks']}` | {counts} | {layers} | yes |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", choices=[*FAMILIES, *MORE], help="these, beside the last results of others"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table of the last run")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown())
        return
    known = json.loads((RESULTS / "families.json").read_text())["results"]["rows"]
    rows = {name: row for name, row in known.items() if arguments.only is not None or not here(name)}
    for family in filter(here, [*FAMILIES, *MORE] if arguments.only is None else arguments.only):
        rows[family] = row_of(family)
        print(family, rows[family], flush=True)
    done = {name: row for name, row in rows.items() if "error" not in row}
    checks = [check("families: model types that go through all stages", len(done), 45, at_most=False),
              check("families: model types that do not", len(rows) - len(done), 0),
              *(check(f"families: {what}", sum(row[key] for row in done.values()), least, at_most=False)
                for what, key, least in (("hybrids and state-space models", "convolutions", 3),
                                         ("with experts", "experts", 5), ("vision-language models", "sees", 2)))]  # fmt: skip
    seconds = inspected()
    checks.append(
        check("families: seconds of sqft inspect of a configuration of 70 B parameters", seconds["inspect"], 3)
    )
    write_results("families", {"rows": rows, "inspect seconds": seconds}, checks)


if __name__ == "__main__":
    main()
