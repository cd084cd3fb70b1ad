"""Training steps on a GPU: LoRA, SparsePEFT, LoRA on INT4 (SQFT) and QA-SparsePEFT on a Llama of 8B's shape with random weights,
bfloat16, in one process, with and without gradient checkpointing; the kernels alone; the compact form's products of few tokens;
Wanda and GPTQ of four such blocks.

The floor of a step is its products at the speed of a large one on this device. With P = 2 x tokens x weights of the blocks and
head, and A of the adapted ones: LoRA 2 P (3 P with checkpointing), a masked adapter A more, for dY^T X.

    python benchmarks/bench_gpu.py [--layers 32] [--only steps|kernels|decode|compress] [--pico]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import check, update_results
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sqft
from sqft.kernels import ops
from sqft.kernels.dispatch import kernel, pick_device
from sqft.kernels.packed import pack_mask
from sqft.kernels.reference import Adapter
from sqft.models.discover import describe
from sqft.quantization.grid import GridSpec
from sqft.quantization.linear import QuantLinear
from sqft.quantization.rtn import rtn
from sqft.registry import KERNELS
from sqft.serving.layers import CompactLinear

SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
         "vocab_size": 128256}  # fmt: skip
PICO = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
ADAPTER = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.0}


class Device:
    """What is measured on, and how; on a CPU without its peak memory."""

    def __init__(self) -> None:
        self.device = pick_device()
        self.gpu = self.device.type != "cpu"

    def wait(self) -> None:
        if self.gpu:
            torch.accelerator.synchronize()

    def seconds(self, work: Callable[[], Any], rounds: int) -> float:
        """Median, after two that warm up."""
        times = []
        for _ in range(rounds + 2):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times[2:])

    def empty(self) -> None:
        gc.collect()
        if self.gpu:
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.accelerator.max_memory_allocated() if self.gpu else 0

    def flops(self, size: int, rounds: int) -> float:
        """FLOP/s of a product of bfloat16 matrices."""
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        return 2 * size**3 / self.seconds(lambda: a @ b, rounds)


def llama(sizes: dict[str, int], layers: int, device: torch.device) -> Any:
    config = LlamaConfig(**sizes, num_hidden_layers=layers, use_cache=False, max_position_embeddings=4096)
    with device:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).bfloat16()
    return model.requires_grad_(False)


def step_of(adapted: Any, batch: int, length: int, device: torch.device) -> Callable[[], None]:
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(0, adapted.config.vocab_size, (batch, length), device=device)

    def step() -> None:
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def count(model: Any) -> tuple[int, int, int]:
    """Weights of the blocks, of those the adapted ones, and of the head."""
    usual = describe(model).family.targets
    weights = {weight.name: weight.shape[0] * weight.shape[1] for weight in describe(model).weights()}
    adapted = sum(count for name, count in weights.items() if name.rsplit(".", 1)[-1] in usual)
    return sum(weights.values()), adapted, model.config.vocab_size * model.config.hidden_size


def steps(sizes: dict[str, int], layers: int, batch: int, length: int, here: Device, rounds: int) -> dict[str, Any]:
    """A model is built once, pruned in place, and quantized in place."""
    rate = here.flops(8192 if here.gpu else 256, rounds)
    found: dict[str, Any] = {"flops_of_a_product": rate, "rows": []}
    model = llama(sizes, layers, here.device)
    weights, adapts, head = count(model)
    for kind in ("LoRA", "SparsePEFT", "SQFT", "QA-SparsePEFT"):
        if kind == "SparsePEFT":
            sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
        if kind == "SQFT":
            group = 128 if here.gpu else 32
            sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=group, symmetric=True, clip="none"))
        masked = kind.endswith("SparsePEFT")
        config = (sqft.SqftConfig(**ADAPTER, quantization_aware=kind.startswith("QA")) if masked
                  else LoraConfig(**ADAPTER))  # fmt: skip
        adapted = sqft.attach(model, config).train()
        for checkpointing in (False, True):
            if checkpointing:
                adapted.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": False})
            here.empty()
            seconds = here.seconds(step_of(adapted, batch, length, here.device), rounds)
            passes = (3 if checkpointing else 2) * weights + 2 * head + masked * adapts
            least = 2 * batch * length * passes / rate
            found["rows"].append({"kind": kind, "checkpointing": checkpointing, "seconds": seconds, "peak_bytes": here.peak(),
                                  "over_the_floor": seconds / least})  # fmt: skip
            print(json.dumps(found["rows"][-1]), flush=True)
        model.gradient_checkpointing_disable()
        model = adapted.unload()
    return found


def kernels(outputs: int, inputs: int, here: Device, rounds: int) -> dict[str, Any]:
    """Each operator of one weight: this device's kernel, the reference in torch, and a copy of the weight in bfloat16."""
    device, group = here.device, 128 if here.gpu else 32
    torch.manual_seed(0)
    mask = torch.rand(outputs, inputs) < 0.5
    w = torch.randn(outputs, inputs) * mask
    layer = QuantLinear.from_quantized(rtn(w, mask, GridSpec(4, group, symmetric=True)), group, True).to(device)
    a, b = torch.randn(32, inputs, device=device), torch.randn(outputs, 32, device=device)
    adapter = Adapter(a, b, pack_mask(mask).to(device), 2.0, w.bfloat16().to(device))
    packed, on_grid = layer.packed(), adapter._replace(base=None)
    x, dy = (torch.randn(4096 if here.gpu else 64, size, device=device).bfloat16() for size in (inputs, outputs))
    whole = adapter.base
    assert whole is not None
    calls: dict[str, tuple[Any, ...]] = {
        "masked_weight": (adapter, torch.bfloat16), "dequantized": (packed, inputs, torch.bfloat16),
        "quant_aware_weight": (packed, on_grid, torch.bfloat16), "masked_gradients": (dy, x, adapter),
        "quant_aware_gradients": (dy, x, packed, on_grid),
    }  # fmt: skip
    found: dict[str, Any] = {
        "copy": here.seconds(whole.clone, rounds),
        "product": here.seconds(lambda: dy.mT @ x, rounds),
    }
    for name, arguments in calls.items():
        found[name] = {"seconds": here.seconds(lambda n=name, c=arguments: kernel(n, device.type)(*c), rounds),
                       "reference": here.seconds(lambda n=name, c=arguments: KERNELS[n](*c), rounds)}  # fmt: skip
    merged = ops.merge_packed(packed, on_grid)
    same = torch.equal(
        ops.dequantized(merged, inputs, torch.float32), ops.quant_aware_weight(packed, on_grid, torch.float32)
    )
    return {"weight": [outputs, inputs], **found, "merged_bits_equal": same}


def decode(outputs: int, inputs: int, here: Device, rounds: int) -> dict[str, Any]:
    """Products of few tokens: microseconds, and bytes of the weight a second as a share of a copy's."""
    device, group = here.device, 128 if here.gpu else 32
    torch.manual_seed(0)
    mask = (torch.rand(outputs, inputs // 64, 64, device=device).argsort(-1) < 32).view(outputs, inputs)
    w = (torch.randn(outputs, inputs, device=device) * mask).bfloat16()
    packed = QuantLinear.from_quantized(rtn(w.float(), mask, GridSpec(4, group, symmetric=True)), group, True)
    dense = nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    layers = {"dense bfloat16": dense, "INT4, de-quantized": packed, "32:64 INT4": CompactLinear.from_packed(packed, pack_mask(mask)),
              "32:64 bfloat16": CompactLinear.from_float(w, pack_mask(mask), None)}  # fmt: skip
    large = torch.empty(1 << (30 if here.gpu else 20), dtype=torch.uint8, device=device)
    rate = 2 * large.numel() / here.seconds(large.clone, rounds)
    rows = []
    for tokens, (name, layer) in itertools.product((1, 8), layers.items()):
        x = torch.randn(tokens, inputs, device=device).bfloat16()
        seconds = here.seconds(lambda layer=layer, x=x: layer(x), rounds)
        bytes_ = sum(tensor.nbytes for tensor in layer.state_dict().values())
        rows.append({"layer": name, "tokens": tokens, "microseconds": 1e6 * seconds, "bytes": bytes_,
                     "share": bytes_ / seconds / rate})  # fmt: skip
    return {"weight": [outputs, inputs], "bytes_a_second_of_a_copy": rate, "rows": rows}


def compress(sizes: dict[str, int], here: Device, samples: int, length: int) -> dict[str, Any]:
    """Seconds of Wanda and of GPTQ, four blocks."""
    tokens: Tensor = torch.randint(0, sizes["vocab_size"], (samples, length))
    model: nn.Module = llama(sizes, 4, here.device)
    group = 128 if here.gpu else 32
    found = {}
    for name, work in (("Wanda", lambda: sqft.sparsify(model, sqft.SparsifyConfig(), tokens)),
                       ("GPTQ", lambda: sqft.quantize(model, sqft.QuantizeConfig(group_size=group), tokens))):  # fmt: skip
        started = time.perf_counter()
        work()
        here.wait()
        found[name] = time.perf_counter() - started
    return {"blocks": 4, "tokens": samples * length, "seconds": found}


def checks_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = {(row["kind"], row["checkpointing"]): row for row in results.get("steps", {}).get("rows", [])}
    checks = []
    for kind, limit in (("SparsePEFT", 1.25), ("QA-SparsePEFT", 1.35)):
        for checkpointing in (False, True):
            if (kind, checkpointing) in rows:
                row = rows[kind, checkpointing]
                name = f"{kind}, checkpointing {checkpointing}"
                checks.append(
                    check(f"{name}: step / LoRA's", row["seconds"] / rows["LoRA", checkpointing]["seconds"], limit)
                )
                checks.append(check(f"{name}: step / floor of its products", row["over_the_floor"], 1.15))
    if "kernels" in results:
        checks.append(check("merged INT4 weight equals the trained one, bit for bit", results["kernels"]["merged_bits_equal"],
                            1, at_most=False))  # fmt: skip
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", choices=["steps", "kernels", "decode", "compress"])
    parser.add_argument("--pico", action="store_true", help="sizes for a test, on any device; results are not written")
    arguments = parser.parse_args()
    here, pico = Device(), arguments.pico
    if not (here.gpu or pico):
        parser.error("there is no accelerator here (--pico runs on a CPU)")
    sizes, rounds = (PICO, 1) if pico else (SIZES, 5)
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "kernels": lambda: kernels(sizes["intermediate_size"], sizes["hidden_size"], here, rounds),
        "decode": lambda: decode(sizes["intermediate_size"], sizes["hidden_size"], here, rounds),
        "compress": lambda: compress(sizes, here, *((2, 16) if pico else (128, 512))),
        "steps": lambda: steps(sizes, 1 if pico else arguments.layers, *((2, 16) if pico else (8, 512)), here, rounds),
    }
    results = {name: run() for name, run in work.items() if arguments.only in (None, name)}
    checks = checks_of(results)
    print(json.dumps({"results": results, "checks": checks}, indent=1))
    if not pico:
        name = torch.cuda.get_device_name() if here.device.type == "cuda" else here.device.type
        update_results("gpu", name, results, checks)


if __name__ == "__main__":
    main()
