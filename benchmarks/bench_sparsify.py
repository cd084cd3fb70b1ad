"""Wanda of SmolLM2-135M (32 x 512 calibration tokens): time against two plain passes, memory, masks, perplexity.
SparseGPT beside it: perplexity, and time and perplexity against llm-compressor's on the same tokens (``make peers``).

The floor of the method is two forward passes of the decoder blocks over the calibration tokens, one to observe the
inputs and one to give the next block the pruned block's outputs.

    python benchmarks/bench_sparsify.py [--model FOLDER] [--calibration SOURCE] [--text SOURCE ...] [--samples N]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from common import PeakMemory, check, write_results
from safetensors.torch import save_file
from torch import Tensor

import sqft
from sqft.calibration import walker
from sqft.calibration.data import read_texts, token_blocks
from sqft.evaluation.perplexity import perplexity
from sqft.models.discover import describe
from sqft.recipe import resolve_model

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".venv-llmcompressor" / "bin" / "python"
CONFIG = sqft.SparsifyConfig(samples=32, length=512, batch_size=1)


def plain_passes(folder: str, tokens: Tensor) -> float:
    """Seconds of two forward passes of all blocks over the calibration tokens, nothing else."""
    model, _ = sqft.load(folder)
    architecture = describe(model)
    calls = walker.capture(architecture, tokens, CONFIG.batch_size)
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(2):
            for index, block in enumerate(architecture.blocks):
                walker.replay(block.module, index, calls, torch.device("cpu"), keep=True)
    return time.perf_counter() - start


def compare_with_naive(folder: str, sparse: str, tokens: Tensor) -> dict[str, int]:
    """Masks against a naive float64 Wanda: norms in float64 of whole-model hooks, a full sort of each row.

    The naive version runs on the pruned model block by block too (block i sees the pruned blocks before it). Weights
    on which both differ count as ties if their scores are equal to within float64 rounding.
    """
    ours, _ = sqft.load(sparse)
    reference, _ = sqft.load(folder)
    masks = {weight.name: weight.mask for weight in describe(ours).weights()}
    different = ties = total = 0
    architecture = describe(reference)
    hidden = walker.capture(architecture, tokens, CONFIG.batch_size)
    for index, block in enumerate(architecture.blocks):
        squares = dict.fromkeys(block.weights, 0.0)

        def observe(name: str, squares: dict[str, Any] = squares) -> Any:
            def hook(module: Any, arguments: Any) -> None:
                squares[name] = squares[name] + arguments[0].detach().double().flatten(0, -2).square().sum(0)

            return hook

        handles = [w.module.register_forward_pre_hook(observe(name)) for name, w in block.weights.items()]
        with torch.no_grad():
            walker.replay(block.module, index, hidden, torch.device("cpu"), keep=False)
        for handle in handles:
            handle.remove()
        for name, weight in block.weights.items():
            score = weight.read().double().abs() * squares[name].sqrt()
            ordered = score.argsort(dim=1, stable=True)
            naive = torch.ones_like(score, dtype=torch.bool)
            naive.scatter_(1, ordered[:, : score.shape[1] // 2], False)
            row, column = (naive != masks[name]).nonzero(as_tuple=True)
            threshold = score.gather(1, ordered[:, score.shape[1] // 2 : score.shape[1] // 2 + 1])[:, 0]
            near = (score[row, column] - threshold[row]).abs() <= 1e-12 * threshold[row]
            different, ties, total = different + len(row), ties + int(near.sum()), total + score.numel()
            weight.write(weight.read() * masks[name])
        with torch.no_grad():
            walker.replay(block.module, index, hidden, torch.device("cpu"), keep=True)
    return {"weights": total, "different": different, "of_which_ties": ties}


def prune_there(folder: str, tokens: Tensor, out: Path) -> dict[str, Any]:
    """llm-compressor's SparseGPT, which writes logs to where it runs."""
    out.mkdir(parents=True)
    save_file({"tokens": tokens}, out / "tokens.safetensors")
    command = [str(PEER), str(ROOT / "benchmarks" / "peer_sparsegpt.py"), str(Path(folder).absolute()),
               str((out / "tokens.safetensors").absolute()), str((out / "model").absolute())]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def text_name(source: str) -> str:
    """'data/wikitext2_tokens/test.jsonl' -> 'wikitext2_tokens/test'."""
    return "/".join(Path(source).parts[-2:]).split(".")[0]


def checks_of(results: dict[str, Any], texts: list[str], promised: bool) -> list[Any]:
    """``promised``: on the texts that the promises are about."""
    scores, peer, masks = results["perplexity"], results["llmcompressor"], results["masks"]
    first = text_name(texts[0])
    checks = [
        check(
            "Wanda / two plain passes of the blocks, time",
            results["seconds"] / results["seconds_two_plain_passes"],
            1.5,
        ),
        check(
            "peak memory / (model + one block + activations)",
            results["peak_mib"] / results["mib_model_block_activations"],
            1.0,
        ),
        check(
            "masks that differ from a naive float64 Wanda, ties excepted",
            masks["different"] - masks["of_which_ties"],
            0,
        ),
    ]
    if promised:
        # What llm-compressor's Wanda gives this model, on two other texts: 1.90 and 1.98 times the dense perplexity.
        checks.append(
            check(f"perplexity Wanda-50 / dense, {first}", scores[f"wanda, {first}"] / scores[f"dense, {first}"], 1.98)
        )
        checks.append(check(f"perplexity SparseGPT-50 / Wanda-50, {first}",
                            scores[f"sparsegpt, {first}"] / scores[f"wanda, {first}"], 1.0))  # fmt: skip
    if peer is not None:
        theirs = [scores[f"llm-compressor's sparsegpt, {text_name(text)}"] for text in texts]
        ours = [scores[f"sparsegpt, {text_name(text)}"] for text in texts]
        ratio = math.prod(a / b for a, b in zip(ours, theirs, strict=True)) ** (1 / len(ours))
        checks.append(
            check("SparseGPT-50: time / llm-compressor's", results["sparsegpt_seconds"] / peer["seconds"], 1.0)
        )
        checks.append(check("SparseGPT-50: perplexity / llm-compressor's, mean of texts", ratio, 1.02))
    return checks


def main() -> None:
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    texts = [
        data / "wikitext2_tokens" / "test.jsonl",
        data / "calibration" / "tiny.jsonl",
        data / "calibration" / "wiki.jsonl.gz",
    ]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-model")
    parser.add_argument("--calibration", default=str(data / "calibration" / "c4.jsonl") if data.is_dir() else "builtin")
    parser.add_argument("--samples", type=int, default=CONFIG.samples)
    parser.add_argument("--text", nargs="+", default=[str(t) for t in texts] if data.is_dir() else ["builtin"])
    arguments = parser.parse_args()
    runs = Path("runs") / "bench-sparsify"
    shutil.rmtree(runs, ignore_errors=True)
    # As safetensors, which are mapped: the figures are then not those of de-quantizing a GGUF file.
    model, tokenizer = sqft.load(resolve_model(arguments.model))
    sqft.save(model, tokenizer, runs / "dense")
    hidden_size, block = model.config.hidden_size, describe(model).blocks[0].module
    block_bytes = sum(p.numel() * p.element_size() for p in block.parameters())
    del model, block
    tokens = token_blocks(tokenizer, read_texts(arguments.calibration), arguments.samples, CONFIG.length, CONFIG.seed)
    dense, sparse = str(runs / "dense"), str(runs / "sparse")
    floor = plain_passes(dense, tokens)
    with PeakMemory() as peak:
        metrics = sqft.sparsify(dense, CONFIG, tokens, out=sparse)
    model_bytes = (runs / "dense" / "model.safetensors").stat().st_size
    limit_mib = (model_bytes + block_bytes + tokens.numel() * hidden_size * 4) / 2**20
    masks = compare_with_naive(dense, sparse, tokens)
    updating = dataclasses.replace(CONFIG, method="sparsegpt")
    sparsegpt = sqft.sparsify(dense, updating, tokens, out=runs / "sparsegpt")
    folders = {"dense": dense, "wanda": sparse, "sparsegpt": str(runs / "sparsegpt")}
    peer = prune_there(dense, tokens, runs / "llmcompressor") if PEER.is_file() else None
    if peer is not None:
        folders["llm-compressor's sparsegpt"] = str(runs / "llmcompressor" / "model")
    scores: dict[str, Any] = {}
    for text in arguments.text:
        for name, folder in folders.items():
            live, _ = sqft.load(folder)
            scores[f"{name}, {text_name(text)}"] = perplexity(live, tokenizer, text, 1024, 3072)["perplexity"]
    results = {
        "seconds": metrics["seconds"], "seconds_two_plain_passes": floor, "peak_mib": peak.mib,
        "mib_model_block_activations": limit_mib, "masks": masks, "sparsity": metrics["sparsity"], "perplexity": scores,
        "sparsegpt_seconds": sparsegpt["seconds"], "sparsegpt_sparsity": sparsegpt["sparsity"], "llmcompressor": peer,
    }  # fmt: skip
    checks = checks_of(results, arguments.text, data.is_dir())
    print(json.dumps({"results": results, "checks": checks}, indent=1))
    write_results("sparsify", results, checks)


if __name__ == "__main__":
    main()
