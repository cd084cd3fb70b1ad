"""SmolLM2-135M where people serve models: which export is exact, how far logits are, and how fast each runtime decodes.

    .venv-runtimes/bin/python benchmarks/bench_runtimes.py [--only exports|speed] [--vllm PYTHON] [--markdown]

Runs in .venv-runtimes (``make peers``), with llama-cpp-python and a vLLM of their own where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, check, update_results

import sqft
from sqft.deployment import BenchConfig
from sqft.recipe import resolve_model
from sqft.registry import RUNTIMES

OUT = Path("runs") / "bench-runtimes"
WORKER = Path(__file__).resolve().parents[1] / "tests" / "peers" / "runtimes_worker.py"
TARGETS = {"vllm": "vLLM", "awq": "AWQ in vLLM", "gguf": "GGUF in llama.cpp", "openvino": "OpenVINO", "onnx": "ONNX Runtime",
           "mlx": "MLX"}  # fmt: skip
SPEEDS = {
    "dense": ("transformers", "openvino", "onnx", "llama.cpp"), "sparse": ("sqft",),
    "dense INT4": ("sqft", "openvino", "onnx", "llama.cpp", "vllm"),
    "sparse INT4, merged": ("sqft", "openvino", "onnx", "llama.cpp", "vllm"), "sparse INT4, compact": ("sqft",),
    "sparse INT4, compact, int8 embeddings": ("sqft",), "sparse INT4 and adapter": ("sqft",),
}  # fmt: skip
RUNTIMES_HERE = {name: RUNTIMES[name].PACKAGE for name in RUNTIMES}
KINDS: dict[str, dict[str, Any] | None] = {  # how it is quantized
    "float16": None,
    "INT4 (the default)": {}, "INT4, symmetric": {"symmetric": True, "scale_bits": 8},
    "INT4, scales of 11 bits": {"scale_bits": 11}, "INT4, zero points from 0": {"min_zero": 0, "scale_bits": 11, "format": "gptq_v2"},
    "INT8, symmetric": {"bits": 8, "symmetric": True},
}  # fmt: skip


def models() -> dict[str, Path]:
    """Models whose speed does not depend on how well they were made: by magnitude and by rounding."""

    def once(name: str, make: Any) -> Path:
        if not (OUT / name).is_dir():
            make(OUT / name)
        return OUT / name

    rounded = sqft.QuantizeConfig(method="rtn")
    dense = once("dense", lambda out: sqft.save(*sqft.load(resolve_model("demo-model"), dtype="float16"), out))
    sparse = once(
        "sparse", lambda out: sqft.sparsify(dense, sqft.SparsifyConfig(method="magnitude", pattern="32:64"), out=out)
    )
    int4 = once("dense-int4", lambda out: sqft.quantize(dense, rounded, out=out))
    sparse4 = once("sparse-int4", lambda out: sqft.quantize(sparse, rounded, out=out))
    text = OUT / "text.jsonl"
    text.write_text(json.dumps({"text": "one two three"}) + "\n")
    adapted = sqft.TrainConfig(adapter="qa-sparse-peft", data=str(text), max_steps=1)
    adapter = once("sparse-int4-and-adapter", lambda out: sqft.train(sparse4, adapted, out=out))
    merged = once("sparse-int4-merged", lambda out: sqft.merge(adapter, out=out))
    compact = once("sparse-int4-compact", lambda out: sqft.pack(merged, out=out))
    small = sqft.QuantizeConfig(method="rtn", embeddings="int8")
    bytes4 = once("sparse-int4-bytes", lambda out: sqft.quantize(sparse, small, out=out))
    compact8 = once("sparse-int4-bytes-compact", lambda out: sqft.pack(bytes4, out=out))
    return {"dense": dense, "sparse": sparse, "dense INT4": int4, "sparse INT4, merged": merged,
            "sparse INT4, compact": compact, "sparse INT4, compact, int8 embeddings": compact8,
            "sparse INT4 and adapter": adapter}  # fmt: skip


def exports(vllm: str | None, kinds: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of each kind of model and each target: whether it is exact, how far logits are, and why not if it is refused."""
    file = RESULTS / "export.json"
    rows: dict[str, Any] = json.loads(file.read_text())["results"]["exports"]["rows"] if file.is_file() else {}
    llama = importlib.util.find_spec("llama_cpp") is not None
    targets = [f"{name}={vllm}" if name in ("vllm", "awq") else name for name in TARGETS
               if (name != "gguf" or llama) and (name not in ("vllm", "awq") or vllm)]  # fmt: skip
    for kind in kinds:
        options = KINDS[kind]
        folder = OUT / "exports" / kind.replace(" ", "-").replace("(", "").replace(")", "").replace(",", "")
        if options is None:
            folder = models()["sparse"]
        elif not folder.is_dir():
            sqft.quantize(models()["sparse"], sqft.QuantizeConfig(method="rtn", **options), out=folder)
        command = [sys.executable, str(WORKER), str(folder), str(folder.with_name(folder.name + "-out")), *targets]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows[kind] = json.loads(done.stdout.splitlines()[-1])
        print(kind, rows[kind], flush=True)
    cells = [
        (kind, target, cell) for kind, row in rows.items() for target, cell in row.items() if "refused" not in cell
    ]
    return {"rows": {kind: rows[kind] for kind in KINDS if kind in rows}}, [
        check("exports: cells that are not exact", sum(not cell["exact"] for *_, cell in cells), 0),
        check("exports: largest difference of logits, of the largest (OpenVINO, ONNX Runtime, MLX in float32)",
              max(cell["logits"] for _, target, cell in cells if target in ("openvino", "onnx", "mlx")), 1e-4),
        check("exports: cells of the default that are refused", sum("refused" in c for c in rows.get("INT4 (the default)", {}).values()), 0),
    ]  # fmt: skip


def speed(vllm: str | None, cases: dict[str, Any], chosen: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    found = models()
    pythons = {"vllm": vllm} if vllm else {}
    names = {str(folder): name for name, folder in found.items()}
    here = {name for name, runtime in RUNTIMES_HERE.items() if importlib.util.find_spec(runtime)} | set(pythons)
    rows = []
    for name in chosen:
        config = BenchConfig(runtimes=[r for r in SPEEDS[name] if r in here], rounds=3, **cases)
        rows += sqft.bench([found[name]], config, pythons=pythons, out=OUT / "speed")
    for row in rows:
        row["model"] = names[str(OUT / row["model"])]
    return {"rows": rows}, speed_checks(rows)


def speed_checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the models that were measured."""
    rates = {(row["model"], row["runtime"]): row["cases"][0]["decode_per_second"] for row in rows if "cases" in row}
    sizes = {(row["model"], row["runtime"]): row["bytes"] for row in rows if "bytes" in row}
    loading = {row["model"]: row["load_seconds"] for row in rows if row["runtime"] == "sqft" and "bytes" in row}
    ours, half, beside = ((name, "sqft") for name in ("sparse INT4, merged", "sparse", "sparse INT4 and adapter"))
    dense, best = ("dense", "transformers"), max(
        ((rate, key[1]) for key, rate in rates.items() if key[0] == "dense INT4" and key[1] != "sqft"), default=None)  # fmt: skip
    checks = []
    if {ours, beside} <= rates.keys():
        checks += [check("runtimes: merged / base and adapter, decode, sqft", rates[ours] / rates[beside], 1.0, False),
                   check("runtimes: merged / base and adapter, bytes", sizes[ours] / sizes[beside], 1.0)]  # fmt: skip
    if best and ours in rates:
        checks.append(check(f"runtimes: sparse INT4, sqft / best dense INT4 elsewhere ({best[1]})", rates[ours] / best[0],
                            1.2, False))  # fmt: skip
    if {half, dense} <= rates.keys():
        checks.append(check("runtimes: sparse half precision, sqft / dense half precision, transformers",
                            rates[half] / rates[dense], 1.5, False))  # fmt: skip
    if {"sparse INT4, compact", "dense INT4"} <= loading.keys():
        checks.append(check("runtimes: seconds to load, compact / dense INT4, sqft",
                            loading["sparse INT4, compact"] / loading["dense INT4"], 1.0))  # fmt: skip
    if {ours, dense} <= sizes.keys():
        checks.append(check("runtimes: sparse INT4 / dense half precision, bytes", sizes[ours] / sizes[dense], 0.45))
    return checks


def markdown() -> str:
    """The tables of docs/deploy.md."""
    lines = []
    if (RESULTS / "export.json").is_file():
        rows = json.loads((RESULTS / "export.json").read_text())["results"]["exports"]["rows"]
        lines += [f"| | {' | '.join(TARGETS.values())} |", "|---|" + "---|" * len(TARGETS)]
        for kind in KINDS:
            lines.append(
                f"| {kind} | " + " | ".join(_cell(rows.get(kind, {}).get(target)) for target in TARGETS) + " |"
            )
    results = json.loads((RESULTS / "decode.json").read_text())["results"]
    for part in [name for name in results if name.startswith("runtimes")]:
        lines += ["", f"| {part}: model | runtime | MB | loads in | peak memory, MB | batch | prompt | prefill, tokens/s | "
                  "decode, tokens/s | share of bandwidth |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in results[part]["rows"]:
            for case in row.get("cases", []):
                if "decode_per_second" in case:
                    share = f"{case['share_of_bandwidth']:.0%}" if "share_of_bandwidth" in case else ""
                    lines.append(f"| {row['model']} | {row['runtime']} | {row['bytes'] / 1e6:.1f} | "
                                 f"{row['load_seconds']:.1f} s | {row['peak_bytes'] / 1e6:.0f} | {case['batch']} | "
                                 f"{case['prompt']} | {case['prefill_per_second']:.0f} | "
                                 f"{case['decode_per_second']:.1f} | {share} |")  # fmt: skip
    return "\n".join(lines)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not run"
    if "refused" in cell:
        return "refused"
    return f"{'exact' if cell['exact'] else 'NOT exact'}, logits {cell['logits']:.1e}, {'same' if cell['greedy'] else 'other'} tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("exports", "speed"))
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of exports; others stay as they were"
    )
    parser.add_argument("--vllm", help="interpreter of an environment that has vLLM")
    parser.add_argument("--prompt", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--label", help="of the results, beside those without")
    parser.add_argument("--models", nargs="+", choices=list(SPEEDS), default=list(SPEEDS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--markdown", action="store_true", help="print the tables of the last run")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown())
        return
    if arguments.only != "speed":
        results, checks = exports(arguments.vllm, arguments.kinds)
        update_results("export", "exports", results, checks)
        print(json.dumps(checks, indent=1))
    if arguments.only != "exports":
        cases = {"prompt": arguments.prompt, "batch": arguments.batch, "tokens": arguments.tokens}
        results, checks = speed(arguments.vllm, cases, arguments.models)
        part = ", ".join(filter(None, ("runtimes", arguments.label)))
        update_results("decode", part, results, [{**c, "name": c["name"].replace("runtimes", part, 1)} for c in checks])
        print(json.dumps(checks, indent=1))


if __name__ == "__main__":
    main()
