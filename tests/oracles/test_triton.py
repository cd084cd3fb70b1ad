"""The Triton kernels on a CPU: by Triton's interpreter against the float64 formulas that every kernel is compared with."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_compact_linear
import test_kernels
import torch
from pico import pico_model
from test_kernels import Problem

import sqft
from sqft.kernels import ops
from sqft.kernels.compact import CompactWeight
from sqft.registry import KERNELS
from sqft.serving.prepare import prepare

pytestmark = [
    pytest.mark.slow,  # the interpreter is
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux alone"),
]
OPERATORS = ["masked_weight", "masked_gradients", "dequantized", "quant_aware_weight", "quant_aware_gradients"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the interpreter: tests/conftest.py asks for it


@pytest.fixture(autouse=True)
def bfloat16_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the nearest, as GPUs do and Triton's compiler asks for; its interpreter cuts bits off."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    usual = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return usual(values, source, target, mode)
        return torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """All operators by Triton's kernels, on this device."""
    monkeypatch.setattr(ops, "kernel", lambda op, kind: KERNELS[f"{op}.cuda"] if op in OPERATORS else KERNELS[op])


# The interpreter takes seconds for what a GPU does at once: fewer grids and starts there, all of them once.
FEW = {torch.float32: ([(3, True)], test_kernels.STARTS), torch.bfloat16: ([(2, False), (8, True)], ["", "fractions "]),
       torch.float16: ([(4, False)], ["float base ", "learnt scales steps"])}  # fmt: skip


@pytest.mark.parametrize("dtype", FEW, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_every_kernel_is_what_the_formula_says(
    op: str, dtype: torch.dtype, with_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":
        for module in ("weights", "gradients"):
            monkeypatch.setattr(f"sqft.kernels.triton.{module}.TILE", {"BO": 64, "BI": 128})
    if DEVICE == "cpu" and op.startswith("quant_aware"):
        monkeypatch.setattr(test_kernels, "GRIDS", FEW[dtype][0])
        monkeypatch.setattr(test_kernels, "SOME_GRIDS", FEW[dtype][0])
        monkeypatch.setattr(test_kernels, "STARTS", FEW[dtype][1])
    getattr(test_kernels, f"check_{op}")(KERNELS[f"{op}.cuda"], DEVICE, dtype)


@pytest.mark.parametrize("tile", [{"BO": 16, "BI": 64}, {"BO": 128, "BI": 32}])
def test_bits_do_not_depend_on_the_tile(tile: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the weight that is built alone nor of the one that the gradients are taken at."""
    weights, gradients = (importlib.import_module(f"sqft.kernels.triton.{name}") for name in ("weights", "gradients"))
    p = Problem(DEVICE, torch.float32)
    adapter = p.start("fractions")
    usual: list[Any] = [weights.masked_weight(p.adapter, torch.float32),
                        weights.quant_aware_weight(p.packed, adapter, torch.float32)]  # fmt: skip
    usual.append(gradients.quant_aware_gradients(p.ddy, p.dx, p.packed, adapter)[3])
    for module in (weights, gradients):
        monkeypatch.setattr(module, "TILE", tile)
    other = [weights.masked_weight(p.adapter, torch.float32),
             weights.quant_aware_weight(p.packed, adapter, torch.float32),
             gradients.quant_aware_gradients(p.ddy, p.dx, p.packed, adapter)[3]]  # fmt: skip
    assert all(torch.equal(one, two) for one, two in zip(usual, other, strict=True))
    assert torch.equal(usual[1], usual[2])


@pytest.mark.parametrize("rank", [1, 17, 70])
def test_any_rank(rank: int) -> None:
    """Of an elastic slice too, and beyond what a program holds."""
    p = Problem(DEVICE, torch.float32)
    g = torch.Generator().manual_seed(rank)
    a = torch.randn(rank + 3, p.w.shape[1], generator=g)[:rank].to(DEVICE)
    b = torch.randn(p.w.shape[0], rank + 3, generator=g)[:, :rank].to(DEVICE)
    adapter = p.adapter._replace(a_RI=a, b_OR=b)
    for name, arguments in (("masked_weight", (adapter, torch.float32)), ("masked_gradients", (p.ddy, p.dx, adapter))):
        ours, theirs = KERNELS[f"{name}.cuda"](*arguments), KERNELS[name](*arguments)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("size", "columns", "pruned", "propagate"), [(128, range(64, 128), True, True), (96, range(96), False, True),
                                                                      (70, range(3, 9), True, False)])  # fmt: skip
def test_columns_are_rounded_as_one_by_one(size: int, columns: range, pruned: bool, propagate: bool) -> None:
    """Sums are rounded otherwise, which may tip an integer and with it what comes after it in its row, but rarely."""
    g = torch.Generator().manual_seed(size)
    w = torch.randn(size, 45, generator=g).to(DEVICE)
    u = torch.randn(size, size, generator=g).mul_(0.1).triu_().fill_diagonal_(0.9).to(DEVICE)
    scale = torch.rand(len(columns), 45, generator=g).add_(0.1).half().float().to(DEVICE)
    zero = torch.randint(0, 16, (len(columns), 45), generator=g).float().to(DEVICE)
    mask = (torch.rand(len(columns), 45, generator=g) < 0.5).to(DEVICE) if pruned else None
    found = []
    for name in ("round_columns", "round_columns.cuda"):
        changed = w.clone()
        found.append([*KERNELS[name](changed, u, columns, scale, zero, mask, 15, propagate), changed])
    same = (found[0][0] == found[1][0]).all(0)
    assert same.float().mean() > 0.9
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        difference = (one.float() - other.float())[:, same].abs()
        assert bool((difference <= (1 if one.dtype == torch.int8 else 1e-4)).all())
    assert mask is None or bool((found[1][0].float() == zero)[~mask].all())


@pytest.mark.parametrize("pattern", test_compact_linear.PATTERNS)
def test_compact_products_are_what_the_weight_means(pattern: str) -> None:
    torch.manual_seed(0)
    weights = [(test_compact_linear.integers(bits, 33, 192, 64, pattern), torch.float32, 1e-6) for bits in (2, 3, 4, 8)]
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        weights.append((test_compact_linear.integers(4, 5, 96, 32, pattern), dtype, tolerance))
        weights.append((test_compact_linear.floats(dtype, 17, 70, pattern), dtype, tolerance))
    for (weight, meant), dtype, tolerance in weights:
        for tokens in (1, 20):
            x = torch.randn(tokens, meant.shape[1]).to(dtype)
            found = on_device(KERNELS["compact_linear.cuda"], x, weight)
            wanted, size = x.double() @ meant.T, x.double().abs() @ meant.abs().T
            assert found.dtype == dtype and bool(((found - wanted).abs() <= tolerance * size).all())


def on_device(op: Any, x: torch.Tensor, weight: CompactWeight) -> torch.Tensor:
    compact = weight.compact._replace(
        mask_OB=weight.compact.mask_OB.to(DEVICE), values=weight.compact.values.to(DEVICE)
    )
    moved = weight._replace(
        compact=compact, **{name: getattr(weight, name).to(DEVICE) for name in ("starts", "scale_OG", "zero_OG")}
    )
    return op(x.to(DEVICE), moved).cpu()


@pytest.mark.parametrize("int4", [True, False])
def test_a_model_on_a_gpu_answers_by_compact_products(int4: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens by the kernel, many by the reference's weight; the head, norms and embeddings stay as they are."""
    model = pico_model("llama", dtype=torch.bfloat16).to(DEVICE)
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    if int4:
        sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=32))
    few, many = (torch.randint(0, 60, (1, length), device=DEVICE) for length in (3, 70))
    with torch.no_grad():
        before = [model(few).logits, model(many).logits]
        monkeypatch.setattr("sqft.serving.prepare.input_device", lambda model: torch.device("cuda"))
        monkeypatch.setattr("sqft.serving.layers.kernel", lambda op, device: KERNELS[f"{op}.cuda"])
        assert prepare(model) == {"CompactLinear": 14} and model.dtype == torch.bfloat16
        after = [model(few).logits, model(many).logits]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus_that_are_not_here(capability: int, tmp_path: Path) -> None:
    """Within a thread's registers; what spills goes through memory."""
    script = Path(__file__).parents[1] / "support" / "compile_triton.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 13
    for name, (registers, spilt) in found.items():
        most = 150 if name.startswith(("build", "de-quantize")) else 190 if name.startswith("product") else 255
        assert registers <= most, (name, registers)
        assert spilt <= (256 if name.startswith("contract") else 0), (name, spilt)
