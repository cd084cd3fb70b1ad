"""GPTQ of SmolLM2-135M (32 x 512 calibration tokens, 4 bits, groups of 64) beside GPTQModel, in one run.

Dense and Wanda-50: seconds, peak memory, zeros kept, perplexity. GPTQModel's result on the sparse model is given the
mask again before its perplexity is measured. Both run in a process of their own; GPTQModel in the environment that
``make peers`` makes (without it, its columns and checks are left out).

    python benchmarks/bench_quantize.py [--model FOLDER] [--calibration SOURCE] [--text SOURCE ...] [--tokens N]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, PeakMemory, check, write_results
from safetensors.torch import load_file, save_file
from torch import Tensor

import sqft
from sqft.calibration.data import read_texts, token_blocks
from sqft.compressing.passes import Quantize
from sqft.evaluation.perplexity import perplexity
from sqft.formats.checkpoint import packed_layers, unpack_model
from sqft.models.discover import describe
from sqft.quantization.gptq import gptq
from sqft.recipe import resolve_model

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".venv-gptqmodel" / "bin" / "python"
CONFIG = sqft.QuantizeConfig(samples=32, length=512)  # else the defaults, as GPTQModel has its own
SPARSIFY = sqft.SparsifyConfig(samples=32, length=512, batch_size=4)


def quantize_here(folder: str, tokens: str, out: str, propagate: bool) -> dict[str, Any]:
    """Our stage, folder to folder, in this process."""
    ids = load_file(tokens)["tokens"]
    each = Quantize(CONFIG)
    if not propagate:
        each.method = dataclasses.replace(gptq, function=functools.partial(gptq.function, propagate=False))
    with PeakMemory() as peak:
        metrics = sqft.compress(folder, [each], ids, out=out)
    return {**metrics, "peak_mib": peak.mib, "highest_mib": peak.highest_mib}


def in_process(*arguments: Any) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--worker", json.dumps(arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def quantize_there(folder: str, tokens: str, out: Path) -> dict[str, Any]:
    """GPTQModel, which wants a working folder for its logs."""
    out.mkdir(parents=True)
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    command = [str(PEER), str(ROOT / "benchmarks" / "peer_gptq.py"), str(Path(folder).absolute()),
               str(Path(tokens).absolute()), str((out / "model").absolute())]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    result = json.loads(done.stdout.splitlines()[-1])
    return {**result, "highest_mib": result["start_mib"] + result["peak_mib"]}


def scores(model: Any, tokenizer: Any, texts: list[str], tokens: int) -> dict[str, float]:
    return {"/".join(Path(text).parts[-2:]).split(".")[0]: perplexity(model, tokenizer, text, 1024, tokens)["perplexity"]
            for text in texts}  # fmt: skip


def scores_of_peer(source: str, weights: dict[str, Tensor], masks: dict[str, Tensor], texts: list[str],
                   tokens: int) -> tuple[dict[str, float], int, int]:  # fmt: skip
    """Perplexity of GPTQModel's weights, masked again, and how many pruned weights there were and it had kept zero."""
    model, tokenizer = sqft.load(source)
    pruned = kept = 0
    for layer in describe(model).weights():
        name, weight = layer.name, weights[layer.name]
        if name in masks:
            pruned += int((~masks[name]).sum())
            kept += int((weight[~masks[name]] == 0).sum())
            weight = weight * masks[name]
        layer.write(weight)
    return scores(model, tokenizer, texts, tokens), pruned, kept


def mean_ratio(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Geometric mean over the texts."""
    product = 1.0
    for text in ours:
        product *= ours[text] / theirs[text]
    return product ** (1 / len(ours))


def main() -> None:
    data = ROOT.parent / "shared" / "data"
    texts = [data / "wikitext2_tokens" / "test.jsonl", data / "calibration" / "tiny.jsonl",
             data / "calibration" / "wiki.jsonl.gz"]  # fmt: skip
    real = data.is_dir()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-model")
    parser.add_argument("--calibration", default=str(data / "calibration" / "c4.jsonl") if real else "builtin")
    parser.add_argument("--text", nargs="+", default=[str(t) for t in texts] if real else ["builtin"])
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--only", choices=("dense", "sparse"), help="renew these results, keep the others")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(quantize_here(*json.loads(arguments.worker))))
        return
    runs = Path("runs") / "bench-quantize"
    shutil.rmtree(runs, ignore_errors=True)
    model, tokenizer = sqft.load(resolve_model(arguments.model))
    sqft.save(model, tokenizer, runs / "dense")
    tokens = token_blocks(tokenizer, read_texts(arguments.calibration), CONFIG.samples, CONFIG.length, CONFIG.seed)
    save_file({"tokens": tokens}, runs / "tokens.safetensors")
    masks: dict[str, Tensor] = {}
    if arguments.only != "dense":
        sqft.sparsify(runs / "dense", SPARSIFY, tokens, out=runs / "sparse")
        masks = {weight.name: mask for weight in describe(sqft.load(runs / "sparse")[0]).weights()
                 if (mask := weight.mask) is not None}  # fmt: skip
    results: dict[str, Any] = {}
    if arguments.only:
        results = json.loads((RESULTS / "quantize.json").read_text())["results"]
    for kind in (arguments.only,) if arguments.only else ("dense", "sparse"):
        source, ids = str(runs / kind), str(runs / "tokens.safetensors")
        live, tokenizer = sqft.load(source)
        results[kind] = {"float": {"perplexity": scores(live, tokenizer, arguments.text, arguments.tokens)}}
        del live
        for name, propagate in (("sqft", True), ("dropped", False)) if kind == "sparse" else (("sqft", True),):
            results[kind][name] = measured = in_process(source, ids, str(runs / f"{kind}-{name}"), propagate)
            live, tokenizer = sqft.load(runs / f"{kind}-{name}")
            assert len(packed_layers(live)) == len(describe(live).names())
            unpack_model(live)
            measured["perplexity"] = scores(live, tokenizer, arguments.text, arguments.tokens)
            del live
        if PEER.is_file():
            results[kind]["gptqmodel"] = measured = quantize_there(source, ids, runs / f"{kind}-gptqmodel")
            weights = load_file(runs / f"{kind}-gptqmodel" / "model" / "dequantized.safetensors")
            applied = masks if kind == "sparse" else {}
            measured["perplexity"], pruned, kept = scores_of_peer(source, weights, applied, arguments.text,
                                                                  arguments.tokens)  # fmt: skip
            measured["zeros_kept"] = kept / pruned if pruned else None
    checks = make_checks(results)
    print(json.dumps({"results": results, "checks": checks}, indent=1))
    write_results("quantize", results, checks)


def make_checks(results: dict[str, Any]) -> list[dict[str, Any]]:
    sparse, dense = results["sparse"], results["dense"]
    ours = sparse["sqft"]
    checks = [
        check("Wanda-50: pruned weights that are not zero after GPTQ", ours["filled"], 0),
        check("Wanda-50: perplexity, corrections of pruned weights handed on / dropped",
              mean_ratio(ours["perplexity"], sparse["dropped"]["perplexity"]), 1.0),
    ]  # fmt: skip
    if "gptqmodel" in sparse:
        for kind, case, limit in (("Wanda-50 (its mask applied again)", sparse, 1.0), ("dense", dense, 1.02)):
            mine, his = case["sqft"], case["gptqmodel"]
            checks += [
                check(f"{kind}: perplexity / GPTQModel's", mean_ratio(mine["perplexity"], his["perplexity"]), limit),
                check(f"{kind}: time / GPTQModel's", mine["seconds"] / his["seconds"], 0.5),
                check(
                    f"{kind}: peak resident memory of the process / GPTQModel's",
                    mine["highest_mib"] / his["highest_mib"],
                    1.0,
                ),
            ]
    return checks


if __name__ == "__main__":
    main()
