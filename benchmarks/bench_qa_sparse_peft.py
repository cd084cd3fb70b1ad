"""QA-SparsePEFT's training step against SparsePEFT's, what it keeps, and the size of packed models, in one run.

python benchmarks/bench_qa_sparse_peft.py [--model FOLDER] [--quick]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from bench_sparse_peft import ADAPTER, make_step, prepare, saved_bytes
from common import alternate, check, write_results

import sqft
from sqft.formats.checkpoint import packed_layers
from sqft.kernels.ops import linear
from sqft.kernels.packed import pack_mask
from sqft.kernels.reference import Adapter
from sqft.quantization.grid import GridSpec
from sqft.quantization.linear import QuantLinear
from sqft.quantization.rtn import rtn
from sqft.sparsity.masks import packed_mask


def layer_case(outputs: int, inputs: int, tokens: int, rounds: int) -> dict[str, Any]:
    """One layer's step, and what it keeps for backward besides x, A, B and the packed base."""
    torch.manual_seed(0)
    mask = torch.rand(outputs, inputs) < 0.5
    w = torch.randn(outputs, inputs) * mask
    layer = QuantLinear.from_quantized(rtn(w, mask, GridSpec(4, 64)), 64, False)
    packed, bits = layer.packed(), pack_mask(mask)
    x, dy = torch.randn(tokens, inputs).requires_grad_(), torch.randn(tokens, outputs)
    a, b = torch.randn(32, inputs).requires_grad_(), (torch.randn(outputs, 32) * 0.01).requires_grad_()
    forms = {
        "sparse_peft": lambda: linear(x, None, None, Adapter(a, b, bits, 2.0, w), training=True),
        "qa_sparse_peft": lambda: linear(x, None, packed, Adapter(a, b, bits, 2.0), training=True),
    }
    seconds = alternate({name: lambda f=form: f().backward(dy) for name, form in forms.items()}, rounds)
    known = (x, a, b, layer.qweight, layer.qzeros, layer.scales)
    return {"layer": [outputs, inputs], "tokens": tokens, "seconds": seconds,
            "bits_a_weight_kept": 8 * saved_bytes(forms["qa_sparse_peft"], known) / w.numel()}  # fmt: skip


def model_case(sparse: str, packed: str, checkpointing: bool, rounds: int) -> dict[str, Any]:
    """A step of SmolLM2, batch 4 x 256, with each kind of adapter."""
    models = {}
    for name, folder in (("sparse_peft", sparse), ("qa_sparse_peft", packed)):
        model, _ = sqft.load(folder)
        peft_model = sqft.attach(model, sqft.SqftConfig(quantization_aware=name == "qa_sparse_peft", **ADAPTER))
        if checkpointing:
            peft_model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        models[name] = peft_model.train()
    seconds = alternate({name: make_step(model) for name, model in models.items()}, rounds)
    return {"checkpointing": checkpointing, "seconds": seconds}


def resident(packed: str) -> dict[str, int]:
    """Bytes of the decoder's packed weights, with scales, zero points, groups and masks, and of float16 ones."""
    model, _ = sqft.load(packed)
    ours = half = 0
    for layer in packed_layers(model).values():
        tensors = [layer.qweight, layer.qzeros, layer.scales, layer.g_idx, packed_mask(layer)]
        ours += sum(t.numel() * t.element_size() for t in tensors if t is not None)
        half += 2 * layer.in_features * layer.out_features
    return {"packed": ours, "float16": half}


def merge_case(packed: str, runs: Path) -> dict[str, Any]:
    """Trains a little, merges twice, and compares the weights file with what it takes on paper."""
    config = sqft.TrainConfig(
        adapter="qa-sparse-peft", task="arithmetic", max_steps=4, batch_size=4, learning_rate=1e-3
    )
    sqft.train(packed, config, out=runs / "adapter")
    metrics = sqft.merge(runs / "adapter", out=runs / "merged-1")
    sqft.merge(runs / "adapter", out=runs / "merged-2")
    one, two = ((runs / name / "model.safetensors").read_bytes() for name in ("merged-1", "merged-2"))
    model, _ = sqft.load(runs / "merged-1")
    paper = sum(p.numel() * p.element_size() for p in model.parameters())  # embeddings and norms, tied ones once
    for layer in packed_layers(model).values():
        groups = layer.scales.numel()
        paper += layer.in_features * layer.out_features * layer.bits / 8 + groups * (2 + layer.bits / 8)
    masks = (runs / "merged-1" / "masks" / "masks.safetensors").stat().st_size
    return {"identical": one == two, "bytes": len(one), "bytes_on_paper": paper, "bytes_of_masks": masks,
            "zeros_kept": metrics["zeros_kept"], "max_logit_difference": metrics["max_logit_difference"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-model")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, results are not written")
    arguments = parser.parse_args()
    sparse = prepare(arguments.model)
    runs = Path("runs") / "bench-qa"
    shutil.rmtree(runs, ignore_errors=True)
    # Round to nearest: how well the integers were chosen does not matter for speed and size.
    sqft.quantize(sparse, sqft.QuantizeConfig(method="rtn"), out=runs / "packed")
    packed, rounds = str(runs / "packed"), 1 if arguments.quick else 5
    sizes = [(1536, 576, 1024), (2048, 2048, 2048), (4096, 4096, 2048)]
    results = {
        "layers": [layer_case(*size, rounds) for size in sizes[: 1 if arguments.quick else 3]],
        "model": [model_case(sparse, packed, c, rounds) for c in (True, False)],
        "resident": resident(packed),
        "merge": merge_case(packed, runs),
    }
    checks = make_checks(results)
    print(json.dumps({"results": results, "checks": checks}, indent=1))
    if not arguments.quick:
        write_results("qa_sparse_peft", results, checks)


def make_checks(results: dict[str, Any]) -> list[dict[str, Any]]:
    checks = []
    for case in results["model"]:
        ratio = case["seconds"]["qa_sparse_peft"] / case["seconds"]["sparse_peft"]
        name = f"step / SparsePEFT step, fp32, checkpointing {'on' if case['checkpointing'] else 'off'}"
        checks.append(check(name, ratio, 1.15))
    for case, (outputs, inputs) in ((case, case["layer"]) for case in results["layers"]):
        name = f"{outputs}x{inputs}: bits a weight kept for backward besides x, A, B"
        checks.append(check(name, case["bits_a_weight_kept"], 2.0))
    size, merge = results["resident"], results["merge"]
    difference = abs((merge["bytes"] + merge["bytes_of_masks"]) / merge["bytes_on_paper"] - 1)
    return [
        *checks,
        check("resident decoder weights, packed with masks / float16", size["packed"] / size["float16"], 0.36),
        check("merged twice: files that differ", int(not merge["identical"]), 0),
        check("merged INT4 weights and masks, files / bytes on paper, difference", difference, 0.02),
        check("pruned weights that are zero after merging", merge["zeros_kept"], 1.0, at_most=False),
    ]


if __name__ == "__main__":
    main()
