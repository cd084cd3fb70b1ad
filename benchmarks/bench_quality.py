"""What one-shot repair gives back of SmolLM2-135M's perplexity (``sqft sparsify --repair layer``, no training): methods and
patterns with and without it, on the same tokens, and what it costs.

    python benchmarks/bench_quality.py [--model FOLDER] [--calibration SOURCE] [--text SOURCE ...] [--samples N]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

from bench_sparsify import text_name
from common import RESULTS, check, write_results

import sqft
from sqft.evaluation.perplexity import perplexity
from sqft.recipe import resolve_model

CASES = [(method, pattern, repair) for pattern in (None, "32:64", "2:4") for method in ("wanda", "sparsegpt")
         for repair in ("none", "layer")]  # fmt: skip


def title(method: str, pattern: str | None, repair: str) -> str:
    return f"{method} {pattern or '50 %'}" + (", repaired" if repair == "layer" else "")


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
    scores = {name: row["perplexity"] for name, row in rows.items()}
    first = next(iter(dense))
    best = min(("wanda", "sparsegpt"), key=lambda method: mean_ratio(scores[f"{method} 50 %, repaired"], dense))
    repaired = {pattern: scores[f"{best} {pattern}, repaired"] for pattern in ("50 %", "32:64", "2:4")}
    return [
        check(f"{best} 50 %, repaired / dense, {first}", repaired["50 %"][first] / dense[first], 1.60),
        check(f"{best} 2:4, repaired / Wanda-50, mean of texts", mean_ratio(repaired["2:4"], scores["wanda 50 %"]), 1.0),
        check(f"{best} 32:64, repaired / 50 % of rows, repaired, mean of texts",
              mean_ratio(repaired["32:64"], repaired["50 %"]), 1.05),
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
    parser.add_argument("--markdown", action="store_true", help="print the table of the last run")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown())
        return
    out = Path("runs") / "bench-quality"
    shutil.rmtree(out, ignore_errors=True)
    model, tokenizer = sqft.load(resolve_model(arguments.model))
    sqft.save(model, tokenizer, out / "dense")

    def scores(folder: Path) -> dict[str, float]:
        live, _ = sqft.load(folder)
        return {text_name(t): perplexity(live, tokenizer, t, 1024, 3072)["perplexity"] for t in arguments.text}

    dense, rows = scores(out / "dense"), {}
    for case in CASES:
        method, pattern, repair = case
        config = sqft.SparsifyConfig(method=method, pattern=pattern, repair=repair, calibration=arguments.calibration,
                                     samples=arguments.samples, length=512, batch_size=1)  # fmt: skip
        seconds = sqft.sparsify(out / "dense", config, out=out / "sparse", overwrite=True)["seconds"]
        rows[title(*case)] = {"perplexity": scores(out / "sparse"), "seconds": seconds}
        print(title(*case), rows[title(*case)], flush=True)
    results = {"samples": arguments.samples, "dense": dense, "rows": rows}
    checks = checks_of(dense, rows)
    print(json.dumps(checks, indent=1))
    write_results("quality", results, checks)


if __name__ == "__main__":
    main()
