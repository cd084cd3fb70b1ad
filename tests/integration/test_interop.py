"""Packed folders go both ways between sqft and its peers: GPTQModel, and llm-compressor with compressed-tensors.

The peers need other versions than sqft, so each runs in a virtual environment of its own (``make peers``), as a process
that does a list of jobs: ``tests/peers``.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import VOCABULARY, pico_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import sqft
from sqft.formats.checkpoint import mark_packed, packed_layers
from sqft.quantization.gptq import gptq
from sqft.quantization.grid import Grid, GridSpec
from sqft.quantization.linear import QuantLinear
from sqft.quantization.method import Quantized
from sqft.quantization.rtn import rtn

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# Logits are of the size of 1. The peers multiply in float32 as we do, in another order.
TOLERANCE = 2e-5


def model_config() -> LlamaConfig:
    """Widths that the peers' kernels take, and no two alike."""
    return LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=128, pad_token_id=258,
                       bos_token_id=257, eos_token_id=256, tie_word_embeddings=False)  # fmt: skip


def dense_model() -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def scrambled(weight: Tensor, spec: GridSpec) -> Quantized:
    """As GPTQ with act-order and without static groups leaves it: neighbours in a random order share a group."""
    inputs = weight.shape[1]
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(1))
    q_OI, grid, _ = rtn(weight[:, order], None, spec)
    back = order.argsort()
    group_I = torch.arange(inputs) // spec.columns(inputs)
    return Quantized(q_OI[:, back], Grid(spec.bits, grid.scale_OG, grid.zero_OG, group_I[back]))


def write(folder: Path, spec: GridSpec, format: str, order: str = "", keep: str = "") -> Path:
    """A packed folder that sqft writes. ``order``: '', 'static' or 'scrambled'; ``keep``: a module that stays float."""
    model = dense_model()
    model.requires_grad_(False)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear) and name != keep:
            x_TI = torch.randn(256, module.in_features, generator=torch.Generator().manual_seed(2))
            if order == "scrambled":
                quantized = scrambled(module.weight, spec)
            else:
                quantized = gptq(module.weight, x_TI.mT @ x_TI, None, spec, act_order=order == "static")
            layer = QuantLinear.from_quantized(quantized, spec.group_size, spec.symmetric)
            parent, _, leaf = name.rpartition(".")
            setattr(model.model.get_submodule(parent), leaf, layer)
    mark_packed(model, format)
    sqft.save(model, pico_tokenizer(), folder)
    return folder


@torch.no_grad()
def our_logits(folder: Path, tokens: Path, weights: torch.dtype) -> Tensor:
    """Of a packed folder, its weights de-quantized to ``weights`` as the peer does; products in float32."""
    model, _ = sqft.load(folder, dtype="float32")
    layers = packed_layers(model)
    assert len(layers) in (13, 14), "all linear layers of two blocks, or all but one"
    ids = load_file(tokens)["ids"]
    if weights == torch.float32:
        return model(ids).logits
    for name, layer in layers.items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight.copy_(layer.dequantize(weights))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    return model(ids).logits


def run_jobs(peer: str, jobs: dict[str, dict], folder: Path) -> dict[str, str]:
    """Runs the peer's worker; what went wrong, by job."""
    python = ROOT / f".venv-{peer}" / "bin" / "python"
    if not python.exists():
        pytest.skip("needs the peer's virtual environment: make peers")
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1",
                   "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    environment.pop("PYTHONPATH", None)
    worker = ROOT / "tests" / "peers" / f"{peer}_worker.py"
    done = subprocess.run(
        [python, worker, file], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )  # GPTQModel writes logs where it runs
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(file.with_suffix(".errors.json").read_text())


def disagreements(peer: str, ours: dict[str, Path], theirs: dict[str, dict], folder: Path,
                  weights: torch.dtype) -> dict[str, str]:  # fmt: skip
    """What fails or has other logits on the other side, by name: of folders that we wrote, and that the peer writes."""
    tokens, calibration = folder / "tokens.safetensors", folder / "calibration.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({"ids": torch.randint(0, 256, (2, 32), generator=generator)}, tokens)
    save_file({"ids": torch.randint(0, 256, (16, 64), generator=generator)}, calibration)
    dense = folder / "dense"
    dense_model().save_pretrained(dense)
    pico_tokenizer().save_pretrained(dense)
    folders, jobs = dict(ours), {}
    for name, options in theirs.items():
        folders[name] = folder / name
        jobs[f"{name}: quantize"] = {"do": "quantize", "folder": str(dense), "out": str(folder / name),
                                     "tokens": str(calibration), **options}  # fmt: skip
    for name, path in folders.items():
        jobs[name] = {"do": "logits", "folder": str(path), "out": str(folder / f"{name}.safetensors"),
                      "tokens": str(tokens)}  # fmt: skip
    problems = run_jobs(peer, jobs, folder)
    for name, path in folders.items():
        if not any(name in problem for problem in problems):
            expected = load_file(folder / f"{name}.safetensors")["logits"]
            difference = float((our_logits(path, tokens, weights) - expected).abs().max())
            print(f"{peer} {name}: largest difference of logits {difference:.1e} of {float(expected.abs().max()):.2f}")
            if not difference <= TOLERANCE:
                problems[name] = f"logits differ by {difference}"
    return problems


def test_gptqmodel(tmp_path: Path) -> None:
    ours = {
        f"ours-{format}-{bits}{order}": write(
            tmp_path / f"ours-{format}-{bits}{order}", GridSpec(bits, size, format == "gptq"), format, order
        )
        for format, bits, size, order in [
            ("gptq", 4, 64, ""), ("gptq", 8, 32, ""), ("gptq", 2, 32, "static"), ("gptq", 3, 64, ""),
            ("gptq_v2", 4, 64, ""), ("gptq_v2", 8, 64, "static"), ("gptq_v2", 2, 32, ""), ("gptq_v2", 3, 32, ""),
            ("gptq_v2", 4, 32, "scrambled"), ("gptq", 4, -1, "static"),
        ]
    }  # fmt: skip
    ours["ours-one-float"] = write(tmp_path / "one", GridSpec(4, 64), "gptq_v2", keep="layers.0.self_attn.k_proj")
    theirs = {
        "theirs-v1": {"bits": 4, "group_size": 64, "sym": True, "desc_act": False, "format": "gptq"},
        "theirs-v1-order": {"bits": 4, "group_size": 32, "sym": True, "desc_act": True, "format": "gptq"},
        "theirs-v2-asym": {"bits": 4, "group_size": 64, "sym": False, "desc_act": False, "format": "gptq_v2"},
        "theirs-v1-3-bits": {"bits": 3, "group_size": 64, "sym": True, "desc_act": False, "format": "gptq"},
    }
    jobs = {name: {"options": options} for name, options in theirs.items()}
    assert disagreements("gptqmodel", ours, jobs, tmp_path, torch.float16) == {}


def test_llm_compressor(tmp_path: Path) -> None:
    ours = {
        name: write(tmp_path / name, spec, "compressed-tensors", order)
        for name, spec, order in [
            ("ours-symmetric", GridSpec(4, 64, True), ""), ("ours-asymmetric", GridSpec(4, 32, False), "static"),
            ("ours-8-bits", GridSpec(8, -1, False), ""), ("ours-2-bits", GridSpec(2, 32, True), ""),
            ("ours-3-bits", GridSpec(3, 32, False), ""),
        ]
    }  # fmt: skip
    ours["ours-one-float"] = write(
        tmp_path / "one", GridSpec(4, 64), "compressed-tensors", keep="layers.0.self_attn.k_proj"
    )
    group = {"num_bits": 4, "strategy": "group", "group_size": 64}
    theirs = {
        "theirs-rtn": {"modifier": "rtn", "weights": {**group, "symmetric": True}},
        "theirs-gptq": {"modifier": "gptq", "weights": {**group, "symmetric": False, "actorder": "weight"}},
        "theirs-channel": {"modifier": "rtn", "weights": {"num_bits": 8, "strategy": "channel", "symmetric": False}},
    }
    assert disagreements("llmcompressor", ours, theirs, tmp_path, torch.float32) == {}
