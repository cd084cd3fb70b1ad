"""How to round SmolLM2-135M to INT4: methods, clipped ranges and kinds of grid in one table, for the dense model and for a
sparse one (Wanda 50 %, repaired), on the same tokens; perplexity of three texts.

    python benchmarks/bench_formats.py [--model FOLDER] [--groups 64 32 -1] [--keep] [--rows N] [--markdown]

Results are written row by row; ``--keep`` measures only what is missing. SmolLM2's width, 576, is no multiple of 128: groups
of 128 need another model (``--model FOLDER --groups 64 128 -1 --name formats-NAME``).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from bench_quality import mean_ratio
from bench_sparsify import text_name
from common import RESULTS, check, write_results

import sqft
from sqft.evaluation.perplexity import perplexity
from sqft.formats.checkpoint import unpack_model
from sqft.recipe import resolve_model

SOURCES = {"dense": "dense", "sparse": "Wanda 50 %, repaired"}
BEFORE = "gptq, mse"  # the default before this table, which the others are measured by
PLAIN = {"method": "gptq", "clip": "mse", "repair": "none", "symmetric": False, "min_zero": 0, "scale_bits": 11}


def cases(groups: list[int]) -> dict[str, dict[str, Any]]:
    """Options by the row's name, the most telling first. All else is the default."""
    repaired = {"repair": "layer"}
    found: dict[str, dict[str, Any]] = {
        BEFORE: {},
        f"{BEFORE}, symmetric": {"symmetric": True},
        f"{BEFORE}, symmetric, scales of 8 bits": {"symmetric": True, "scale_bits": 8},
        f"{BEFORE}, zero points 1 to 15": {"min_zero": 1},
        f"{BEFORE}, zero points 1 to 15, scales of 7 bits": {"min_zero": 1, "scale_bits": 7},
        f"{BEFORE}, scales of 8 bits": {"scale_bits": 8},
        "gptq, mse, repair": repaired,
        "gptq, mse, symmetric, scales of 8 bits, repair": {"symmetric": True, "scale_bits": 8, **repaired},
        "gptq, hessian": {"clip": "hessian"},
        "gptaq, mse": {"method": "gptaq"},
        "gptq, hessian, repair": {"clip": "hessian", **repaired},
        "gptaq, hessian": {"method": "gptaq", "clip": "hessian"},
        "gptaq, hessian, repair": {"method": "gptaq", "clip": "hessian", **repaired},
    }
    for size in groups[1:]:
        found[f"{BEFORE}, {'whole rows' if size == -1 else f'groups of {size}'}"] = {"group_size": size}
    return {name: {**PLAIN, "group_size": groups[0], **options} for name, options in found.items()}


def markdown(name: str) -> str:
    """The table of docs/quantization.md."""
    results = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    texts = list(results["float"]["dense"])
    lines = []
    for source, title in SOURCES.items():
        rows, unrounded = results["rows"].get(source, {}), results["float"].get(source)
        if not unrounded:
            continue
        lines += [f"| {title} | {' | '.join(texts)} | over float | over {BEFORE} | bits a weight |",
                  "|---|" + "---|" * (len(texts) + 3)]  # fmt: skip
        numbers = " | ".join(f"{value:.2f}" for value in unrounded.values())
        lines.append(f"| float | {numbers} | 1.000 | | |")
        for row, content in rows.items():
            scores = content["perplexity"]
            numbers = " | ".join(f"{value:.2f}" for value in scores.values())
            ratio = f"{mean_ratio(scores, rows[BEFORE]['perplexity']):.3f}" if BEFORE in rows else ""
            lines.append(f"| {row} | {numbers} | {mean_ratio(scores, unrounded):.3f} | {ratio} "
                         f"| {content['bits']:.2f} |")  # fmt: skip
        lines.append("")
    return "\n".join(lines)


def checks_of(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of what has been measured: the default of now against that of before."""
    config = sqft.QuantizeConfig()
    now = f"{config.method}, {config.clip}, zero points {config.min_zero} to 15, scales of {config.scale_bits} bits"
    found = []
    for source, title in SOURCES.items():
        ratios = {name: mean_ratio(row["perplexity"], rows[source][BEFORE]["perplexity"])
                  for name, row in rows[source].items() if BEFORE in rows[source]}  # fmt: skip
        same = {name: ratio for name, ratio in ratios.items()
                if not any(word in name for word in ("symmetric", "zero points", "scales", "groups", "rows"))}  # fmt: skip
        if len(same) > 1:
            best = min(same, key=same.__getitem__)
            found.append(check(f"{title}: best ({best}) / {BEFORE}, mean of texts", same[best], 0.97))
        if now in ratios:
            found.append(check(f"{title}: default ({now}) / {BEFORE}, mean of texts", ratios[now], 1.0))
    return found


def main() -> None:
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    texts = [data / "wikitext2_tokens" / "test.jsonl", data / "calibration" / "tiny.jsonl",
             data / "calibration" / "wiki.jsonl.gz"]  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-model")
    parser.add_argument("--groups", nargs="+", type=int, default=[64, 32, -1], help="the first is that of most rows")
    parser.add_argument("--calibration", default=str(data / "calibration" / "c4.jsonl") if data.is_dir() else "builtin")
    parser.add_argument("--samples", type=int, default=32, help="blocks of 512 tokens")
    parser.add_argument("--text", nargs="+", default=[str(t) for t in texts] if data.is_dir() else ["builtin"])
    parser.add_argument("--name", default="formats", help="of the result file")
    parser.add_argument("--rows", type=int, help="measure the first N rows of each model only")
    parser.add_argument("--keep", action="store_true", help="measure only what the last results lack")
    parser.add_argument("--markdown", action="store_true", help="print the table of the last run")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(arguments.name))
        return
    out = Path("runs") / f"bench-{arguments.name}"
    results: dict[str, Any] = {"model": arguments.model, "samples": arguments.samples, "float": {},
                               "rows": {source: {} for source in SOURCES}}  # fmt: skip
    if not arguments.keep:
        shutil.rmtree(out, ignore_errors=True)
    elif (RESULTS / f"{arguments.name}.json").is_file():
        results = json.loads((RESULTS / f"{arguments.name}.json").read_text())["results"]
    common: dict[str, Any] = {"calibration": arguments.calibration, "samples": arguments.samples, "length": 512}

    def scores(folder: Path) -> dict[str, float]:
        live, _ = sqft.load(folder)
        unpack_model(live)
        return {text_name(t): perplexity(live, tokenizer, t, 1024, 3072)["perplexity"] for t in arguments.text}

    model, tokenizer = sqft.load(resolve_model(arguments.model))
    if not (out / "dense").is_dir():
        sqft.save(model, tokenizer, out / "dense", overwrite=True)
    del model
    if not (out / "sparse").is_dir():
        sqft.sparsify(out / "dense", sqft.SparsifyConfig(repair="layer", **common), out=out / "sparse")
    for name, options in [("", {}), *list(cases(arguments.groups).items())[: arguments.rows]]:
        for source in SOURCES:
            if name in results["rows"][source] or (not name and source in results["float"]):
                continue
            if not name:
                results["float"][source] = scores(out / source)
                continue
            config = sqft.QuantizeConfig(**options, **common)
            metrics = sqft.quantize(out / source, config, out=out / "quantized", overwrite=True)
            results["rows"][source][name] = {
                "perplexity": scores(out / "quantized"), "seconds": metrics["seconds"],
                "bits": metrics["bits_per_weight"], "zeros_kept": metrics["zeros_kept"] if source == "sparse" else None,
            }  # fmt: skip
            print(source, name, results["rows"][source][name], flush=True)
            write_results(arguments.name, results, checks_of(results["rows"]))
    print(json.dumps(checks_of(results["rows"]), indent=1))


if __name__ == "__main__":
    main()
