"""Prints the checks of all results: every number that is promised, its limit, and whether it holds."""

from __future__ import annotations

import json
import sys

from common import RESULTS
from rich.console import Console
from rich.table import Table


def markdown() -> str:
    """The tables of docs/sparse-peft.md, from the result files."""
    lines = []
    for file in sorted(RESULTS.glob("sparse_peft.json")):
        content = json.loads(file.read_text())
        machine, results = content["machine"], content["results"]
        product = results["float32_product"]
        lines += [
            f"**{machine['processor']}, {machine['threads']} threads, float32 products of masked layers by {product}**",
            f"(`benchmarks/results/{file.name}`, torch {content['versions']['torch']}, {content['date'][:10]})",
            "",
            "| SmolLM2-135M, batch 4 x 256 | LoRA s/step | SparsePEFT s/step | ratio | naive s/step |",
            "|---|---|---|---|---|",
        ]
        for case in results["model"] + [{**case, "mkl": True} for case in results.get("model_mkl", [])]:
            s = case["seconds"]
            name = (
                f"{case['dtype']}, checkpointing {'on' if case['checkpointing'] else 'off'}, dropout {case['dropout']}"
            )
            name += " (MKL, `SQFT_CPU_PRODUCT=mkl`)" if "mkl" in case else ""
            ratio = s["sparse_peft"] / s["lora"]
            lines.append(f"| {name} | {s['lora']:.2f} | {s['sparse_peft']:.2f} | {ratio:.2f} | {s['naive']:.2f} |")
        lines += ["", "| one layer, 2048 tokens | LoRA ms | SparsePEFT ms | naive ms | SparsePEFT / naive | GFLOP/s |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for case in results["layers"]:
            s = {k: 1e3 * v for k, v in case["seconds"].items()}
            name = f"{case['layer']}x{case['layer']}, {case['dtype']}, dropout {case['dropout']}"
            ratio = s["sparse_peft"] / s["naive"]
            lines.append(f"| {name} | {s['lora']:.0f} | {s['sparse_peft']:.0f} | {s['naive']:.0f} | {ratio:.2f} "
                         f"| {case['gflops']:.0f} |")  # fmt: skip
        lines += ["", "| peak MiB over the loaded model, float32 | LoRA | SparsePEFT | ratio |", "|---|---|---|---|"]
        for case in results["memory"]:
            m = case["peak_mib_over_model"]
            name = f"checkpointing {'on' if case['checkpointing'] else 'off'}, dropout {case['dropout']}"
            lines.append(f"| {name} | {m['lora']:.0f} | {m['sparse_peft']:.0f} | {m['sparse_peft'] / m['lora']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    if "--markdown" in sys.argv:
        print(markdown())
        return 0
    table = Table("benchmark", "check", "value", "limit", "holds")
    failed = 0
    for file in sorted(RESULTS.glob("*.json")):
        for entry in json.loads(file.read_text())["checks"]:
            failed += not entry["holds"]
            holds = "yes" if entry["holds"] else "NO"
            table.add_row(file.stem, entry["name"], f"{entry['value']:.4g}", f"{entry['limit']:.4g}", holds)
    Console(width=160).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
