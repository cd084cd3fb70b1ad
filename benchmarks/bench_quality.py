"""What repair gives back of SmolLM2-135M's perplexity: pruning methods and patterns, and GPTQ on the dense and on a
sparse model, without repair, with ``--repair layer`` and with ``--repair block``, on the same tokens; and what it costs.

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
from common import RESULTS, check, machine, write_results

import sqft
from sqft.compressing import passes
from sqft.evaluation.perplexity import perplexity
from sqft.formats.checkpoint import unpack_model
from sqft.recipe import resolve_model

PRUNED = (("wanda", None), ("sparsegpt", None), ("wanda", "32:64"), ("wanda", "2:4"), ("sparsegpt", "2:4"))
REPAIRS = {"": "none", ", repaired": "layer"}
SPARSE = "wanda 50 %, repaired"  # what is quantized, beside the dense model
MORE = f"{SPARSE}, four times the tokens"
BLOCKS = ", blocks repaired"  # rows of --repair block
BLOCK_ROWS = (("sparsegpt", "2:4"), ("wanda", None), ("wanda", "32:64"), ("wanda", "2:4"))
MORE_BLOCKS = f"sparsegpt 2:4{BLOCKS}, four times the tokens"


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
    """Of the rows that are there."""
    scores, first = {name: row["perplexity"] for name, row in rows.items()}, next(iter(dense))
    wanted = [  # what, of which row, against which (None: the dense model), limit
        (f"{MORE} / dense, {first}", MORE, None, 1.60),
        *((f"{name} / Wanda-50, mean of texts", name, "wanda 50 %", 1.0)
          for name in ("sparsegpt 2:4, repaired", f"sparsegpt 2:4{BLOCKS}", MORE_BLOCKS)),
        (f"wanda 50 %{BLOCKS} / dense, worst text", f"wanda 50 %{BLOCKS}", None, 1.60),
        ("wanda 32:64 / 50 %, both repaired, mean of texts", "wanda 32:64, repaired", SPARSE, 1.05),
        *((f"GPTQ of {kind}: repaired / not, mean of texts", f"GPTQ, 4 bits, repaired, of {kind}",
           f"GPTQ, 4 bits, of {kind}", 0.97) for kind in ("dense", SPARSE)),
    ]  # fmt: skip
    checks = []
    for what, ours, theirs, limit in wanted:
        if ours in scores and (theirs is None or theirs in scores):
            base = dense if theirs is None else scores[theirs]
            ratios = {text: scores[ours][text] / base[text] for text in dense}
            mean = mean_ratio(scores[ours], base)
            checks.append(
                check(what, mean if "mean" in what else ratios[first] if first in what else max(ratios.values()), limit)
            )
    return checks


def arguments_of() -> argparse.Namespace:
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    texts = [data / "wikitext2_tokens" / "test.jsonl", data / "calibration" / "tiny.jsonl",
             data / "calibration" / "wiki.jsonl.gz"]  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-model")
    parser.add_argument("--calibration", default=str(data / "calibration" / "c4.jsonl") if data.is_dir() else "builtin")
    parser.add_argument("--samples", type=int, default=32, help="blocks of 512 tokens")
    parser.add_argument("--text", nargs="+", default=[str(t) for t in texts] if data.is_dir() else ["builtin"])
    parser.add_argument("--keep", action="store_true", help="measure only what the last results lack")
    parser.add_argument("--only", default="", help="measure only rows with this in their names")
    parser.add_argument("--precision", default="auto", help="of products in the repair of blocks")
    parser.add_argument("--markdown", action="store_true", help="print the table of the last run")
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of()
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
        if name in rows or arguments.only not in name:
            return
        metrics = verb(out / source, config, out=out / name, overwrite=True)
        rows[name] = {"perplexity": scores(out / name), "seconds": metrics["seconds"], "processor": processor}
        rows[name] |= {key: metrics[key] for key in ("error_before", "error_after") if key in metrics}
        print(name, rows[name], flush=True)
        write_results("quality", {"samples": arguments.samples, "dense": dense, "rows": rows}, checks_of(dense, rows))

    dense, processor = scores(out / "dense"), machine()["processor"]
    for method, pattern in PRUNED:
        for repaired, repair in REPAIRS.items():
            config = sqft.SparsifyConfig(method=method, pattern=pattern, repair=repair, **common)
            measure(f"{method} {pattern or '50 %'}{repaired}", sqft.sparsify, "dense", config)
    small = {**common, "batch_size": 1, "repair_precision": arguments.precision}  # of 1: more steps of training
    for method, pattern in BLOCK_ROWS:
        config = sqft.SparsifyConfig(method=method, pattern=pattern, repair="block", **small)
        measure(f"{method} {pattern or '50 %'}{BLOCKS}", sqft.sparsify, "dense", config)
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
    more = {**small, "samples": 4 * arguments.samples}
    config = sqft.SparsifyConfig(method="sparsegpt", pattern="2:4", repair="block", **more)
    measure(MORE_BLOCKS, sqft.sparsify, "dense", config)
    print(json.dumps(checks_of(dense, rows), indent=1))


if __name__ == "__main__":
    main()
