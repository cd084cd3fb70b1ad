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


def markdown_quantize() -> str:
    """The tables of docs/quantization.md, from the result files."""
    lines = []
    file = RESULTS / "quantize.json"
    if file.is_file():
        content = json.loads(file.read_text())
        results = content["results"]
        texts = list(results["dense"]["float"]["perplexity"])
        lines += [
            f"**{content['machine']['processor']}, {content['machine']['threads']} threads** "
            f"(`benchmarks/results/{file.name}`, torch {content['versions']['torch']}, {content['date'][:10]})", "",
            "| SmolLM2-135M, 4 bits, groups of 64, asymmetric | seconds | peak MiB of the process | zeros kept | "
            + " | ".join(f"ppl {text}" for text in texts) + " |",
            "|---|---|---|---|" + "---|" * len(texts),
        ]  # fmt: skip
        names = {
            "float": "not quantized",
            "sqft": "sqft",
            "dropped": "sqft, corrections dropped",
            "gptqmodel": "GPTQModel",
        }
        for kind, title in (("dense", "dense"), ("sparse", "Wanda-50")):
            for key, case in results[kind].items():
                name = f"{title}, {names[key]}"
                if (kind, key) == ("sparse", "gptqmodel"):
                    name += ", mask applied again"
                kept = case.get("zeros_kept") if kind == "sparse" else None
                shown = [f"{case[k]:.0f}" if k in case else "-" for k in ("seconds", "highest_mib")]
                shown.append("-" if kept is None else f"{int(kept * 1e5) / 1e3:.3f} %")
                lines.append(
                    f"| {name} | " + " | ".join(shown + [f"{case['perplexity'][t]:.2f}" for t in texts]) + " |"
                )
        lines.append("")
    file = RESULTS / "qa_sparse_peft.json"
    if file.is_file():
        results = json.loads(file.read_text())["results"]
        lines += ["| float32 | SparsePEFT s/step | QA-SparsePEFT s/step | ratio |", "|---|---|---|---|"]
        cases = [(f"SmolLM2-135M, batch 4 x 256, checkpointing {'on' if c['checkpointing'] else 'off'}", c["seconds"])
                 for c in results["model"]]  # fmt: skip
        cases += [
            (f"layer {c['layer'][0]}x{c['layer'][1]}, {c['tokens']} tokens", c["seconds"]) for c in results["layers"]
        ]
        for name, s in cases:
            ours = s["qa_sparse_peft"]
            lines.append(f"| {name} | {s['sparse_peft']:.3f} | {ours:.3f} | {ours / s['sparse_peft']:.2f} |")
        size, merge = results["resident"], results["merge"]
        lines += ["", f"Resident decoder weights: {size['packed'] / 1e6:.1f} MB packed with masks, {size['float16'] / 1e6:.1f} "
                  f"MB in float16 ({size['packed'] / size['float16']:.3f}). Merged weights file: {merge['bytes'] / 1e6:.2f} MB, "
                  f"on paper {merge['bytes_on_paper'] / 1e6:.2f} MB; the masks beside it take {merge['bytes_of_masks'] / 1e6:.2f}"
                  " MB."]  # fmt: skip
    return "\n".join(lines)


def markdown_nls() -> str:
    """The table of docs/nls.md, from the result file."""
    file = RESULTS / "nls.json"
    if not file.is_file():
        return ""
    content = json.loads(file.read_text())
    results, machine = content["results"], content["machine"]
    table, seconds = results["table"], results["overhead"]["seconds"]
    names = {"super": "super-adapter, largest ranks", "median": "median heuristic", "minimal": "smallest ranks",
             "searched": "searched (hill climbing)", "fixed SparsePEFT": "fixed rank, SparsePEFT",
             "fixed LoRA": "fixed rank, plain LoRA (cannot be merged)"}  # fmt: skip
    lines = [
        f"**{machine['processor']}, {machine['threads']} threads** (`benchmarks/results/{file.name}`, "
        f"{content['date'][:10]}). SmolLM2-135M pruned by Wanda to 50 %, {table['examples']} problems of the demo's task, "
        f"{table['train']['super']['steps']} steps.", "",
        "| sub-adapter | test accuracy (95 % interval) | problems | adapter weights | file |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for key, case in table["scores"].items():
        low, high = case["accuracy_ci95"]
        lines.append(f"| {names[key]} | {case['accuracy']:.1%} ({low:.1%} - {high:.1%}) | {case['problems']} "
                     f"| {case['adapter_weights'] / 1e6:.2f} M | {case['adapter_bytes'] / 1e6:.1f} MB |")  # fmt: skip
    search = table["search"]
    lines += ["", f"The search tried {search['evaluated']} of {search['configurations']:.2g} sub-adapters in "
              f"{search['seconds']:.0f} s, scored on {search['scored_on']}. A step of elastic rank took "
              f"{seconds['elastic']:.2f} s, of a fixed rank {results['overhead']['mean_rank']:.0f} "
              f"{seconds['fixed']:.2f} s ({seconds['elastic'] / seconds['fixed']:.3f})."]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    if "--markdown" in sys.argv:
        for part in (markdown(), markdown_quantize(), markdown_nls()):
            print(part)
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
