"""Half precision on a CPU without units for it: products are float32's, rounded once, in every stage alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pico import pico_folder, pico_model
from torch import nn

import sqft
from sqft.kernels.dispatch import is_slow_half, product
from sqft.kernels.halves import fast_halves

HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def old_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx2": True})
    is_slow_half.cache_clear()
    yield
    is_slow_half.cache_clear()


def test_which_processor_has_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, slow in (
        ({"avx512_bf16": True}, (True, False)),
        ({"amx_fp16": True}, (False, True)),
        ({}, (True, True)),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: {"architecture": "x86_64", **found})
        is_slow_half.cache_clear()
        assert (is_slow_half(torch.float16), is_slow_half(torch.bfloat16)) == slow
        assert not is_slow_half(torch.float32)
    is_slow_half.cache_clear()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_product_is_float32s_rounded_once(dtype: torch.dtype, old_processor: None) -> None:
    torch.manual_seed(0)
    linear: Any = nn.Linear(48, 40).to(dtype).requires_grad_(False)
    x: Any = torch.randn(2, 5, 48, dtype=dtype, requires_grad=True)
    with fast_halves(linear):
        y = linear(x)
        y.backward(dy := torch.randn(2, 5, 40).to(dtype))
    w, bias = linear.weight.double(), linear.bias.double()
    wanted, gradient = x.detach().double() @ w.T + bias, dy.double() @ w
    step = torch.finfo(dtype).eps
    assert y.dtype == x.grad.dtype == dtype
    assert float((y.detach().double() - wanted).abs().max()) <= step * float(wanted.abs().max()) / 2
    assert float((x.grad.double() - gradient).abs().max()) <= step * float(gradient.abs().max()) / 2
    assert torch.equal(y.detach()[0], product(x.detach()[0], linear.weight, linear.bias))
    assert "forward" not in vars(linear)


def test_a_weight_that_is_trained_gets_its_gradient(old_processor: None) -> None:
    linear = nn.Linear(8, 8).bfloat16()
    with fast_halves(linear):
        linear(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
        with torch.no_grad():  # then it is a weight like any other
            assert torch.equal(linear(x := torch.randn(1, 8).bfloat16()), product(x, linear.weight, linear.bias))
    assert linear.weight.grad is not None and float(linear.weight.grad.float().sum()) == 64


@pytest.mark.parametrize("dtype", HALVES)
def test_every_stage_goes_that_way_and_a_merge_is_still_exact(
    dtype: torch.dtype, tmp_path: Path, old_processor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    plain: Any = F.linear

    def watched(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.add(x.dtype)
        return plain(x, *rest)

    pico_folder(tmp_path / "m", "llama", dtype)
    sqft.sparsify(tmp_path / "m", sqft.SparsifyConfig(samples=4, length=32, repair="layer"), out=tmp_path / "s")
    config = sqft.TrainConfig(task="arithmetic", limit=16, max_steps=2, eval_limit=0)
    with monkeypatch.context() as watching:
        watching.setattr(F, "linear", watched)
        watching.setattr(
            "sqft.kernels.dispatch.use_onednn", lambda: False
        )  # which no function of torch's is called for
        sqft.train(tmp_path / "s", config, out=tmp_path / "a")
        sqft.evaluate(tmp_path / "s", sqft.EvaluateConfig(text="builtin", length=32, max_tokens=64))
    merged = sqft.merge(tmp_path / "a", out=tmp_path / "merged")
    assert merged["max_logit_difference"] == 0 and merged["zeros_kept"] == 1
    scores = [sqft.evaluate(tmp_path / name, sqft.EvaluateConfig(text="builtin", length=32, max_tokens=256))["perplexity"]
              for name in ("a", "merged")]  # fmt: skip
    assert scores[0] == scores[1]
    assert seen and not seen & set(HALVES)
    assert next(iter(sqft.load(tmp_path / "merged")[0].parameters())).dtype == dtype


def test_scores_are_near_those_of_units(tmp_path: Path, old_processor: None) -> None:
    model = pico_model(dtype=torch.bfloat16)
    tokens = torch.randint(0, 250, (2, 16))
    with torch.no_grad():
        plain = model(tokens).logits.float()
        with fast_halves(model):
            wide = model(tokens).logits.float()
    assert float((plain - wide).abs().max()) < 0.05 * float(plain.abs().max())
