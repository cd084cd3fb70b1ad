"""SparsePEFT against closed forms, the official implementation's numbers, gradcheck and a naive formulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sqft.kernels import dispatch
from sqft.kernels.ops import drop, linear, masked_weight
from sqft.kernels.packed import pack_mask, unpack_mask
from sqft.kernels.reference import Adapter

FIXTURE = Path(__file__).parents[1] / "fixtures" / "sparsepeft.npz"
ALL = ["mkl", "onednn"] if hasattr(torch.ops.mkldnn, "_linear_pointwise") else ["mkl"]


@pytest.fixture(params=ALL)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Every implementation of the product that this machine has."""
    monkeypatch.setenv("SQFT_CPU_PRODUCT", request.param)
    dispatch.use_onednn.cache_clear()
    yield request.param
    dispatch.use_onednn.cache_clear()


def sparse_linear(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, mask: Tensor, scale: float,
                  dropout: float = 0.0, training: bool = True) -> Tensor:  # fmt: skip
    return linear(x, bias, None, Adapter(a, b, mask, scale, w), dropout, training)


def layer(dtype: torch.dtype, out: int = 24, inputs: int = 19, rank: int = 4, tokens: tuple = (3, 5), seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(out, inputs, generator=g) < 0.5
    w = (torch.randn(out, inputs, generator=g) * mask).to(dtype)
    a, b = torch.randn(rank, inputs, generator=g), torch.randn(out, rank, generator=g)
    x, bias = torch.randn(*tokens, inputs, generator=g).to(dtype), torch.randn(out, generator=g).to(dtype)
    return x, w, bias, a, b, mask


@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_equals_the_official_numbers(precision: str, product: str) -> None:
    data = np.load(FIXTURE)
    t = {key.split("/")[1]: torch.tensor(data[key]) for key in data.files if key.startswith(f"sparsepeft_{precision}/")}
    mask = pack_mask(t["W"] != 0)
    x, a, b = (t[name].requires_grad_() for name in ("x", "A", "B"))
    y = sparse_linear(x, t["W"], t["bias"], a, b, mask, 2.0)
    (y * t["G"]).sum().backward()
    tolerance = {"f32": 2e-5, "f64": 1e-13}[precision]
    for ours, name in [(y, "y"), (x.grad, "grad_x"), (a.grad, "grad_A"), (b.grad, "grad_B"),
                       (masked_weight(Adapter(a, b, mask, 2.0, t["W"]), t["W"].dtype), "W_merged")]:  # fmt: skip
        torch.testing.assert_close(ours, t[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_in_float64(dropout: float) -> None:
    x, w, bias, a, b, mask = layer(torch.float64)
    a, b = a.double(), b.double()
    packed = pack_mask(mask)

    def f(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(1)
        return sparse_linear(x, w, bias, a, b, packed, 0.7, dropout)

    assert torch.autograd.gradcheck(f, tuple(v.clone().requires_grad_() for v in (x, bias, a, b)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equals_the_naive_formulation(dtype: torch.dtype, dropout: float, product: str) -> None:
    """Base in any precision, adapters in float32; the naive one in float64 with the same dropped elements."""
    x, w, bias, a, b, mask = layer(dtype, out=130, inputs=75, tokens=(40,))
    dy = torch.randn(40, 130, generator=torch.Generator().manual_seed(3)).to(dtype)
    ours = [v.clone().requires_grad_() for v in (x, a, b)]
    torch.manual_seed(5)
    y = sparse_linear(ours[0], w, bias, ours[1], ours[2], pack_mask(mask), 0.5, dropout)
    y.backward(dy)
    torch.manual_seed(5)
    keep = drop(torch.ones_like(x), dropout, torch.randint(2**62, ())) if dropout else torch.ones_like(x)
    naive = [v.double().clone().requires_grad_() for v in (x, a, b)]
    delta = mask * (naive[2] @ naive[1]) * 0.5
    expected = F.linear(naive[0], w.double(), bias.double()) + F.linear(naive[0] * keep.double(), delta)
    expected.backward(dy.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for mine, his in [(y, expected), *((m.grad, n.grad) for m, n in zip(ours, naive, strict=True))]:
        scale = float(his.abs().max())
        torch.testing.assert_close(mine.double() / scale, his / scale, rtol=0, atol=tolerance)


def test_dropout_leaves_the_base_path_alone_and_keeps_the_mean() -> None:
    x, w, bias, a, b, mask = layer(torch.float32)
    y = sparse_linear(x, w, bias, a, torch.zeros_like(b), pack_mask(mask), 2.0, 0.5)
    torch.testing.assert_close(y, F.linear(x, w, bias))
    dropped = drop(torch.ones(400, 1000), 0.3, torch.tensor(7))
    assert abs(float((dropped == 0).float().mean()) - 0.3) < 0.003
    assert abs(float(dropped.mean()) - 1) < 0.005
    assert torch.equal(dropped, drop(torch.ones(400, 1000), 0.3, torch.tensor(7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_is_the_merged_layer_bit_for_bit(dtype: torch.dtype) -> None:
    x, w, bias, a, b, mask = layer(dtype, out=300, inputs=203)
    merged = masked_weight(Adapter(a, b, pack_mask(mask), 0.5, w), dtype)
    assert merged.dtype == dtype
    assert not merged[~mask].any()
    y = sparse_linear(x, w, bias, a, b, pack_mask(mask), 0.5, dropout=0.3, training=False)
    assert torch.equal(y, F.linear(x, merged, bias))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_backward(dtype: torch.dtype, dropout: float) -> None:
    """Besides x and the parameters W, A and B themselves: one bit a weight, and 8 bytes of seed."""
    x, w, _, a, b, mask = layer(dtype, out=96, inputs=64, tokens=(200,))
    x, a, b = x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sparse_linear(x, w, None, a, b, pack_mask(mask), 2.0, dropout)
    for known in (x, w, a, b):
        kept.pop(known.data_ptr(), None)
    assert sum(kept.values()) <= 96 * 64 / 8 + 8


def test_compiles_without_a_graph_break_and_gives_the_same() -> None:
    x, w, bias, a, b, mask = layer(torch.float32)
    packed = pack_mask(mask)
    a, b = a.requires_grad_(), b.requires_grad_()
    compiled = torch.compile(
        lambda x: sparse_linear(x, w, bias, a, b, packed, 0.5), fullgraph=True, backend="aot_eager"
    )
    y = compiled(x)
    torch.testing.assert_close(y, sparse_linear(x, w, bias, a, b, packed, 0.5))
    ours = torch.autograd.grad(y.square().sum(), (a, b))
    plain = torch.autograd.grad(sparse_linear(x, w, bias, a, b, packed, 0.5).square().sum(), (a, b))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_recomputes_the_same(reentrant: bool) -> None:
    x, w, bias, a, b, mask = layer(torch.float32)
    packed = pack_mask(mask)
    x, a, b = x.requires_grad_(), a.requires_grad_(), b.requires_grad_()

    def f(x: Tensor) -> Tensor:
        return sparse_linear(x, w, bias, a, b, packed, 0.5, 0.5)

    torch.manual_seed(11)
    plain = torch.autograd.grad(f(x).square().sum(), (x, a, b))
    torch.manual_seed(11)
    y = torch.utils.checkpoint.checkpoint(f, x, use_reentrant=reentrant)
    y.square().sum().backward()
    for gradient, value in zip(plain, (x, a, b), strict=True):
        assert torch.equal(gradient, value.grad)


def test_autocast() -> None:
    x, w, bias, a, b, mask = layer(torch.float32)
    a, b = a.requires_grad_(), b.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_linear(x, w, bias, a, b, pack_mask(mask), 0.5)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert a.grad is not None and a.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), sparse_linear(x, w, bias, a, b, pack_mask(mask), 0.5), rtol=0.05, atol=0.3)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 100])
def test_masks_pack_to_one_bit(columns: int) -> None:
    mask = torch.rand(13, columns, generator=torch.Generator().manual_seed(columns)) < 0.4
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (13, -(-columns // 8))
    assert torch.equal(unpack_mask(packed, columns), mask)
    as_bytes = torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    assert torch.equal(packed, as_bytes)
