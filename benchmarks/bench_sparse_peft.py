"""SparsePEFT's training step against PEFT's LoRA and a naive masked adapter, in one run.

A masked adapter needs one product more than LoRA in a step (dY^T X, to be masked). With P = tokens x adapted weights
x 2 FLOPs, a step of an adapted layer costs LoRA 2 P (forward, dX) or 3 P with gradient checkpointing, SparsePEFT 3 P
or 4 P; with dropout, which keeps base and adapter apart, 5 P or 7 P; the naive formulation 5 P or 7 P.

    python benchmarks/bench_sparse_peft.py [--model FOLDER] [--quick] [--only layers|model|memory]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import PeakMemory, alternate, check, write_results
from peft import LoraConfig
from torch import Tensor, nn

import sqft
from sqft.adapters.peft_bridge import adapter_layers
from sqft.kernels import dispatch
from sqft.kernels.ops import linear
from sqft.kernels.packed import pack_mask
from sqft.kernels.reference import Adapter
from sqft.recipe import resolve_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAPTER = {"r": 32, "lora_alpha": 64, "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]}
BATCH = (4, 256)


def naive_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
    """Materialises mask and B A, and multiplies twice."""
    adapter = ((b @ a) * (w != 0)).to(x.dtype)
    return F.linear(x, w) + scale * F.linear(F.dropout(x, dropout), adapter)


def lora_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
    """What PEFT's LoRA layer computes."""
    adapter = F.linear(F.linear(F.dropout(x.to(a.dtype), dropout), a), b) * scale
    return (F.linear(x, w) + adapter).to(x.dtype)


def layer_case(size: int, tokens: int, dtype: str, dropout: float, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    mask = torch.rand(size, size) < 0.5
    w = (torch.randn(size, size) * mask).to(DTYPES[dtype])
    packed = pack_mask(mask)
    x = torch.randn(tokens, size).to(DTYPES[dtype]).requires_grad_()
    dy = torch.randn(tokens, size).to(DTYPES[dtype])
    a, b = torch.randn(32, size).requires_grad_(), torch.randn(size, 32).requires_grad_()
    forms = {
        "lora": lambda: lora_linear(x, w, a, b, 2.0, dropout),
        "naive": lambda: naive_linear(x, w, a, b, 2.0, dropout),
        "sparse_peft": lambda: linear(x, None, None, Adapter(a, b, packed, 2.0, w), dropout, True),
    }
    seconds = alternate({name: lambda f=form: f().backward(dy) for name, form in forms.items()}, rounds)
    saved = {name: saved_bytes(form, (x, w, a, b)) for name, form in forms.items()}
    products = 5 if dropout else 3
    return {"layer": size, "tokens": tokens, "dtype": dtype, "dropout": dropout, "seconds": seconds,
            "saved_bytes_besides_x_w_a_b": saved, "one_bit_a_weight": size * size // 8,
            "gflops": 2e-9 * size * size * tokens * products / seconds["sparse_peft"]}  # fmt: skip


def saved_bytes(form: Any, known: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps between forward and backward, besides the tensors in ``known``."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        form()
    for tensor in known:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


class NaiveLayer(nn.Module):
    """The naive formulation in a model: shares weights with a SparsePEFT layer."""

    def __init__(self, layer: Any, dropout: float) -> None:
        super().__init__()
        self.base, self.a, self.b = (
            layer.get_base_layer(),
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
        )
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return naive_linear(x, self.base.weight, self.a, self.b, 2.0, self.dropout)


def make_model(kind: str, sparse: str, dtype: str, checkpointing: bool, dropout: float) -> Any:
    model, _ = sqft.load(sparse, dtype=dtype)
    shared = copy.deepcopy(ADAPTER)
    config = (
        LoraConfig(lora_dropout=dropout, **shared)
        if kind == "lora"
        else sqft.SqftConfig(lora_dropout=dropout, **shared)
    )
    peft_model = sqft.attach(model, config)
    if kind == "naive":
        for name, layer in adapter_layers(peft_model).items():
            parent, leaf = name.rsplit(".", 1)
            setattr(peft_model.base_model.model.get_submodule(parent), leaf, NaiveLayer(layer, dropout))
    if checkpointing:
        peft_model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return peft_model.train()


def make_step(model: Any) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(1000, 40000, BATCH, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def model_case(sparse: str, dtype: str, checkpointing: bool, dropout: float, rounds: int) -> dict[str, Any]:
    kinds = ("lora", "naive", "sparse_peft")
    models = {kind: make_model(kind, sparse, dtype, checkpointing, dropout) for kind in kinds}
    seconds = alternate({kind: make_step(model) for kind, model in models.items()}, rounds)
    return {"dtype": dtype, "checkpointing": checkpointing, "dropout": dropout, "seconds": seconds}


def memory_worker(kind: str, sparse: str, checkpointing: bool, dropout: float) -> None:
    """Peak memory of two steps over the loaded model, in a process of its own."""
    model = make_model(kind, sparse, "float32", checkpointing, dropout)
    for parameter in model.parameters():  # touch what is mapped from the file: it is the loaded model
        parameter.detach().sum()
    step = make_step(model)
    with PeakMemory() as peak:
        step()
        step()
    print(json.dumps({"mib": peak.mib}))


def memory_case(sparse: str, checkpointing: bool, dropout: float) -> dict[str, Any]:
    peak = {}
    for kind in ("lora", "sparse_peft"):
        arguments = json.dumps([kind, sparse, checkpointing, dropout])
        done = subprocess.run([sys.executable, __file__, "--memory-worker", arguments], capture_output=True, text=True,
                              check=True)  # fmt: skip
        peak[kind] = json.loads(done.stdout.splitlines()[-1])["mib"]
    return {"checkpointing": checkpointing, "dropout": dropout, "peak_mib_over_model": peak}


def make_checks(results: dict[str, Any]) -> list[dict[str, Any]]:
    checks = []
    for case in results.get("model", []):
        ratio = case["seconds"]["sparse_peft"] / case["seconds"]["lora"]
        if case["dtype"] == "float32" and case["checkpointing"]:
            limit = 1.33 if case["dropout"] else 1.20
            checks.append(check(f"step / LoRA step, fp32, checkpointing, dropout {case['dropout']}", ratio, limit))
    for case in results.get("memory", []):
        peak = case["peak_mib_over_model"]
        name = f"peak memory / LoRA's, checkpointing {case['checkpointing']}, dropout {case['dropout']}"
        checks.append(check(name, peak["sparse_peft"] / peak["lora"], 1.05))
    for case in results.get("layers", []):
        name = f"{case['layer']}x{case['layer']} {case['dtype']} dropout {case['dropout']}"
        if (case["layer"], case["dtype"], case["dropout"]) == (4096, "float32", 0.0):
            seconds = case["seconds"]
            checks.append(check(f"{name}: step / naive step", seconds["sparse_peft"] / seconds["naive"], 0.65))
        bits = 8 * case["saved_bytes_besides_x_w_a_b"]["sparse_peft"] / case["layer"] ** 2
        # The 8-byte dropout seed is all there is beyond the mask.
        checks.append(
            check(f"{name}: bits a weight kept for backward besides x, A, B", bits, 1 + 64 / case["layer"] ** 2)
        )
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-model")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cases, results are not written")
    parser.add_argument("--only", choices=["layers", "model", "memory"])
    parser.add_argument("--memory-worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_worker:
        memory_worker(*json.loads(arguments.memory_worker))
        return
    results: dict[str, Any] = {"float32_product": "onednn" if dispatch.use_onednn() else "mkl"}
    chosen = (arguments.only,) if arguments.only else ("layers", "model", "memory")
    rounds = 1 if arguments.quick else 5
    if "layers" in chosen:
        sizes = (2048,) if arguments.quick else (2048, 4096)
        cases = itertools.product(sizes, ("float32", "bfloat16"), (0.0, 0.1))
        results["layers"] = [layer_case(size, 2048, dtype, dropout, rounds) for size, dtype, dropout in cases]
    if "model" in chosen or "memory" in chosen:
        sparse = prepare(arguments.model)
    if "model" in chosen:
        dtypes = ("float32",) if arguments.quick else ("float32", "bfloat16")
        cases = itertools.product(dtypes, (True, False), (0.0, 0.1))
        results["model"] = [model_case(sparse, *case, rounds=min(rounds, 3)) for case in cases]
        if (
            dispatch.use_onednn()
        ):  # the same with the library that PEFT's layers use: what is owed to the arithmetic alone
            with_mkl(lambda: results.update(model_mkl=[model_case(sparse, "float32", True, p, 2) for p in (0.0, 0.1)]))
    if "memory" in chosen:
        results["memory"] = [memory_case(sparse, *case) for case in itertools.product((True, False), (0.0, 0.1))]
    checks = make_checks(results)
    print(json.dumps({"results": results, "checks": checks}, indent=1))
    if not arguments.quick and not arguments.only:
        write_results("sparse_peft", results, checks)


def with_mkl(action: Callable[[], None]) -> None:
    os.environ["SQFT_CPU_PRODUCT"] = "mkl"
    dispatch.use_onednn.cache_clear()
    try:
        action()
    finally:
        del os.environ["SQFT_CPU_PRODUCT"]
        dispatch.use_onednn.cache_clear()


def prepare(model: str) -> str:
    """A 50 % sparse model; which weights are pruned does not matter for speed."""
    folder = Path("runs") / "bench-sparse"
    if not (folder / "sqft.json").is_file():
        sqft.sparsify(resolve_model(model), sqft.SparsifyConfig(method="magnitude"), out=folder)
    return str(folder)


if __name__ == "__main__":
    main()
