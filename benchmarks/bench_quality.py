"""What one-shot repair (``--repair layer``, no training) gives back of SmolLM2-135M's perplexity: pruning methods and
patterns, and GPTQ on the dense and on a sparse model, with and without it, on the same tokens; and what it costs.

    python benchmarks/bench_quality.py [--model FOLDER] [--calibration SOURCE] [--text SOURCE ...] [--samples N]
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

from bench_sparsify import text_name
from common import RESULTS, check, write_results

import sqft
from sqft.compressing import passes
from sqft.evaluation.perplexity import perplexity
from sqft.formats.checkpoint import unpack_model
from sqft.recipe import resolve_model

PRUNED = (("wanda", None), ("sparsegpt", None), ("wanda", "32:64"), ("wanda", "2:4"), ("sparsegpt", "2:4"))
REPAIRS = {"": "none", ", repaired": "layer"}
SPARSE = "wanda 50 %, repaired"  # what is quantized, beside the dense model
MORE = f"{SPARSE}, four times the tokens"


def mean_ratio(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Geometric mean over the texts."""
    return math.exp(sum(math.log(ours[text] / theirs[text]) for text in ours) / len(ours))


def markdown() -> str:
    """The table of docs/sparsity.md."""
    content = json.loads((RESULTS / "quality.json").read_text())
    rows, dense = content["results"]["rows"], content["results"]["dense"]
    lines = [f"| | {' | '.join(dense)} | over dense | seconds |", "|---|" + "---|" * (len(dense) + 2)]
    for name, row in [("dense", {"perplexity": dense, "seconds": None}), *rows.items()]:
        numbers = " | ".join(f"{value:.2f}" for value in row["perplexity"].values())
        ratio = math.ceil(100 * mean_ratio(row["perplexity"], dense)) / 100
        lines.append(
            f"| {name} | {numbers} | {ratio:.2f} | {'' if row['seconds'] is None else round(row['seconds'])} |"
        )
    return "\n".join(lines)


def checks_of(dense: dict[str, float], rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    scores, first = {name: row["perplexity"] for name, row in rows.items()}, next(iter(dense))
    ratio = {kind: mean_ratio(scores[f"GPTQ, 4 bits, repaired, of {kind}"], scores[f"GPTQ, 4 bits, of {kind}"])
             for kind in ("dense", SPARSE)}  # fmt: skip
    return [
        check(f"{MORE} / dense, {first}", scores[MORE][first] / dense[first], 1.60),
        check("sparsegpt 2:4, repaired / Wanda-50, mean of texts",
              mean_ratio(scores["sparsegpt 2:4, repaired"], scores["wanda 50 %"]), 1.0),
        check("wanda 32:64 / 50 %, both repaired, mean of texts",
              mean_ratio(scores["wanda 32:64, repaired"], scores[SPARSE]), 1.05),
        *(check(f"GPTQ of {kind}: repaired / not, mean of texts", value, 0.97) for kind, value in ratio.items()),
    ]  # fmt: skip


def main() -> None:
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    texts = [data / "wikitext2_tokens" / "test.jsonl", data / "calibration" / "tiny.jsonl",
             data / "calibration" / "wiki.jsonl.gz"]  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-model")
    parser.add_argument("--calibration", default=str(data / "calibration" / "c4.jsonl") if data.is_dir() else "builtin")
    parser.add_argument("--samples", type=int, default=32, help="blocks of 512 tokens")
    parser.add_argument("--text", nargs="+", default=[str(t) for t in texts] if data.is_dir() else ["builtin"])
    parser.add_argument("--keep", action="store_true", help="measure only what the last results lack")
    parser.add_argument("--markdown", action="store_true", help="print the table of the last run")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown())
        return
    out, rows = Path("runs") / "bench-quality", {}
    if arguments.keep:
        rows = json.loads((RESULTS / "quality.json").read_text())["results"]["rows"]
    else:
        shutil.rmtree(out, ignore_errors=True)
    model, tokenizer = sqft.load(resolve_model(arguments.model))
    sqft.save(model, tokenizer, out / "dense", overwrite=True)
    common: dict[str, Any] = {"calibration": arguments.calibration, "samples": arguments.samples, "length": 512}

    def scores(folder: Path) -> dict[str, float]:
        live, _ = sqft.load(folder)
        unpack_model(live)
        return {text_name(t): perplexity(live, tokenizer, t, 1024, 3072)["perplexity"] for t in arguments.text}

    def measure(name: str, verb: Any, source: str, config: Any) -> None:
        if name in rows:
            return
        seconds = verb(out / source, config, out=out / name, overwrite=True)["seconds"]
        rows[name] = {"perplexity": scores(out / name), "seconds": seconds}
        print(name, rows[name], flush=True)

    dense = scores(out / "dense")
    for method, pattern in PRUNED:
        for repaired, repair in REPAIRS.items():
            config = sqft.SparsifyConfig(method=method, pattern=pattern, repair=repair, **common)
            measure(f"{method} {pattern or '50 %'}{repaired}", sqft.sparsify, "dense", config)
    for lean in (0.0, 1.0):
        kept, passes.repair = passes.repair, functools.partial(passes.repair, lean=lean)
        config = sqft.SparsifyConfig(repair="layer", **common)
        measure(f"{SPARSE}, a = {lean:g}", sqft.sparsify, "dense", config)
        passes.repair = kept
    for source in ("dense", SPARSE):
        for repaired, repair in REPAIRS.items():
            measure(
                f"GPTQ, 4 bits{repaired}, of {source}",
                sqft.quantize,
                source,
                sqft.QuantizeConfig(repair=repair, **common),
            )
    config = sqft.SparsifyConfig(repair="layer", **{**common, "samples": 4 * arguments.samples})
    measure(MORE, sqft.sparsify, "dense", config)
    results = {"samples": arguments.samples, "dense": dense, "rows": rows}
    checks = checks_of(dense, rows)
    print(json.dumps(checks, indent=1))
    write_results("quality", results, checks)


if __name__ == "__main__":
    main()
