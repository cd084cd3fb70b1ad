"""QA-SparsePEFT against the official implementation's numbers, closed forms and a naive straight-through version."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sqft.formats import gptq as gptq_format
from sqft.formats.settings import Settings
from sqft.kernels.ops import dequantized, drop, linear, merge_packed, quant_aware_weight
from sqft.kernels.packed import Packed, pack_mask
from sqft.kernels.reference import Adapter, scale_limits
from sqft.quantization.grid import Grid, GridSpec
from sqft.quantization.linear import QuantLinear
from sqft.quantization.method import Quantized
from sqft.quantization.rtn import rtn

FIXTURE = Path(__file__).parents[1] / "fixtures" / "qa_sparsepeft.npz"
CASES = ["qa_g128_sym", "qa_g32_sym", "qa_g32_asym", "qa_g32_sym_dequantbase", "qa_g32_sym_fp16scales"]


def quant_aware_linear(x: Tensor, packed: Packed, bias: Tensor | None, adapter: Adapter, dropout: float = 0.0,
                       training: bool = True) -> Tensor:  # fmt: skip
    return linear(x, bias, packed, adapter, dropout, training)


def official(case: str) -> tuple[dict[str, Tensor], Packed, Adapter]:
    data = np.load(FIXTURE)
    t = {key.split("/")[1]: torch.tensor(data[key]) for key in data.files if key.startswith(case + "/")}
    settings = Settings(4, 128 // t["scales"].shape[0], "_sym" in case, "gptq")
    layer = gptq_format.decode("layer", {"qweight": t["qweight_base"], **t}, settings)
    # The official layer adds to the un-quantized weight; in one case that is what the integers mean.
    base = None if "dequantbase" in case else t["base_weight"]
    return t, layer.packed(), Adapter(t["A"], t["B"], pack_mask(t["base_weight"] != 0), 2.0, base)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_official_numbers(case: str) -> None:
    """Forward, merged integers and the gradient of x.

    With float16 scales the official merged layer multiplies in float16, so that it differs from its own training; ours
    computes in float32 in both.
    """
    t, packed, adapter = official(case)
    x = t["x"].requires_grad_()
    y = quant_aware_linear(x, packed, None, adapter)
    torch.testing.assert_close(y, t["y"], rtol=2e-5, atol=2e-5)
    (y * t["G"]).sum().backward()
    torch.testing.assert_close(x.grad, t["grad_x"], rtol=2e-5, atol=2e-4)
    torch.testing.assert_close(quant_aware_weight(packed, adapter, torch.float32).mT, t["dequantize_weight"])
    assert torch.equal(merge_packed(packed, adapter).qweight, t["qweight_merged"])
    tolerance = 2e-3 if "fp16scales" in case else 2e-5
    torch.testing.assert_close(y, t["y_merged_quantlinear"], rtol=tolerance, atol=tolerance)
    base = QuantLinear(128, 64, 4, 128 // packed.scales.shape[0])
    base.qweight, base.qzeros, base.scales = packed.qweight, packed.qzeros, packed.scales
    torch.testing.assert_close(base(t["x"].detach()), t["y_base_quantlinear"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_official_ones_but_for_clamped_weights(case: str) -> None:
    """One closed form gives both: the official numbers without the clamp's mask C, ours with it."""
    t, packed, adapter = official(case)
    x, dy = t["x"].flatten(0, 1), t["G"].flatten(0, 1)
    mask = t["base_weight"] != 0
    g = (dy.mT @ x) * mask
    torch.testing.assert_close(2 * t["B"].mT @ g, t["grad_A"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(2 * g @ t["A"].mT, t["grad_B"], rtol=1e-4, atol=1e-3)
    w = (t["base_weight"] if adapter.base is not None else dequantized(packed, 128, torch.float32)) + 2 * (
        t["B"] @ t["A"]
    ) * mask
    grid = layer_of(packed).grid()
    units = w / grid.spread(grid.scale_OG, 128) + grid.spread(grid.zero_OG, 128)
    inside = (units >= -0.5) & (units <= 15.5)
    assert 0 < float((~inside).float().mean()) < 0.1  # the fixtures do clamp
    g = g * inside
    a, b = t["A"].requires_grad_(), t["B"].requires_grad_()
    (quant_aware_linear(t["x"], packed, None, adapter._replace(a_RI=a, b_OR=b)) * t["G"]).sum().backward()
    torch.testing.assert_close(a.grad, 2 * b.detach().mT @ g, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(b.grad, 2 * g @ a.detach().mT, rtol=1e-4, atol=1e-3)


def layer_of(packed: Packed) -> QuantLinear:
    layer = QuantLinear(128, packed.scales.shape[1], packed.bits, 128 // packed.scales.shape[0])
    layer.qweight, layer.qzeros, layer.scales = packed.qweight, packed.qzeros, packed.scales
    if packed.g_idx is not None:
        layer.g_idx = packed.g_idx
    return layer


def problem(bits: int, symmetric: bool = False, scrambled: bool = False, seed: int = 0):
    """x [T, 64], packed [96, 64] half pruned, its grid, A, B, mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(96, 64, generator=g) < 0.5
    w = torch.randn(96, 64, generator=g) * mask
    q_OI, grid, _ = rtn(w, mask, GridSpec(bits, 32, symmetric))
    if scrambled:
        order = torch.randperm(64, generator=g)
        group = torch.arange(64).div(32, rounding_mode="floor")
        q_OI, grid = q_OI[:, order], Grid(bits, grid.scale_OG, grid.zero_OG, group[order])
        mask = mask[:, order]
    layer = QuantLinear.from_quantized(Quantized(q_OI, grid), 32, symmetric)
    a, b = torch.randn(4, 64, generator=g), torch.randn(96, 4, generator=g) * 0.2
    return torch.randn(40, 64, generator=g), layer, a, b, mask


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t: Tensor) -> Tensor:
        return t.round()

    @staticmethod
    def backward(ctx, dt: Tensor) -> Tensor:
        return dt


def naive(
    x: Tensor, layer: QuantLinear, a: Tensor, b: Tensor, mask: Tensor, scale: float, new: Tensor | None
) -> Tensor:
    """Everything materialised, in float64, with autograd's own clamp."""
    grid = layer.grid()
    s0, z = (grid.spread(v, 64).double() for v in (grid.scale_OG, grid.zero_OG))
    s = s0 if new is None else new.mT.repeat_interleave(32, 1)
    w = (layer.integers().double() - z) * s0 + scale * (b @ a) * mask
    q = torch.clamp(Round.apply(w / s), -z, 2**layer.bits - 1 - z)
    return x @ (q * s).mT


@pytest.mark.parametrize("scrambled", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_the_naive_version(bits: int, symmetric: bool, scrambled: bool) -> None:
    x, layer, a, b, mask = problem(bits, symmetric, scrambled)
    adapter = [v.clone().requires_grad_() for v in (x, a, b)]
    y = quant_aware_linear(adapter[0], layer.packed(), None, Adapter(adapter[1], adapter[2], pack_mask(mask), 0.5))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    y.backward(dy)
    doubles = [v.double().clone().requires_grad_() for v in (x, a, b)]
    expected = naive(doubles[0], layer, doubles[1], doubles[2], mask, 0.5, None)
    expected.backward(dy.double())
    for mine, his in [(y, expected), *((m.grad, n.grad) for m, n in zip(adapter, doubles, strict=True))]:
        torch.testing.assert_close(mine.double(), his, rtol=1e-4, atol=2e-4)
    # The integers that merging stores mean the very weight that was multiplied with, and keep the zeros.
    packed = merge_packed(layer.packed(), Adapter(a, b, pack_mask(mask), 0.5))
    weight = dequantized(packed, 64, torch.float32)
    assert torch.equal(weight, quant_aware_weight(layer.packed(), Adapter(a, b, pack_mask(mask), 0.5), torch.float32))
    assert not weight[~mask].any() and not torch.equal(packed.qweight, layer.qweight)
    assert torch.equal(packed.qzeros, layer.qzeros) and torch.equal(packed.scales, layer.scales)


@pytest.mark.parametrize("scrambled", [False, True])
def test_learnt_scales(scrambled: bool) -> None:
    x, layer, a, b, mask = problem(4)
    if scrambled:
        x, layer, a, b, mask = problem(4, scrambled=True)
    new = (layer.scales.float() * 1.1).half().float().requires_grad_()
    y = quant_aware_linear(x, layer.packed(), None, Adapter(a, b, pack_mask(mask), 0.5, None, new))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    y.backward(dy)
    theirs = new.detach().double().clone().requires_grad_()
    if scrambled:
        s = theirs.mT.index_select(1, layer.g_idx.long())
        grid = layer.grid()
        z, s0 = grid.spread(grid.zero_OG, 64).double(), grid.spread(grid.scale_OG, 64).double()
        w = (layer.integers().double() - z) * s0 + 0.5 * (b @ a).double() * mask
        expected = x.double() @ (torch.clamp(Round.apply(w / s), -z, 15 - z) * s).mT
    else:
        expected = naive(x.double(), layer, a.double(), b.double(), mask, 0.5, theirs)
    expected.backward(dy.double())
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new.grad.double(), theirs.grad, rtol=1e-3, atol=2e-3)
    stored = merge_packed(layer.packed(), Adapter(a, b, pack_mask(mask), 0.5, None, new.detach()))
    assert torch.equal(stored.scales.float(), new.detach())


def test_dropout_touches_the_adapter_only() -> None:
    """The official code drops the base path too; here B = 0 gives the base's output, exactly."""
    x, layer, a, b, mask = problem(4)
    adapter = Adapter(a, torch.zeros_like(b), pack_mask(mask), 0.5)
    torch.testing.assert_close(quant_aware_linear(x, layer.packed(), None, adapter, 0.5), layer(x))
    torch.manual_seed(3)
    y = quant_aware_linear(x, layer.packed(), None, adapter._replace(b_OR=b), 0.5)
    torch.manual_seed(3)
    keep = drop(torch.ones(1, 64), 0.5, torch.randint(2**62, ()))
    expected = quant_aware_linear(x, layer.packed(), None, Adapter(a * keep, b, pack_mask(mask), 0.5))
    assert torch.equal(y, expected) and set(keep.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_backward(dtype: torch.dtype) -> None:
    """Besides x, A, B and the packed base: the mask, one bit a weight, and 8 bytes of seed."""
    x, layer, a, b, mask = problem(4)
    x, a, b = x.to(dtype).requires_grad_(), a.requires_grad_(), b.requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        quant_aware_linear(x, layer.packed(), None, Adapter(a, b, pack_mask(mask), 0.5), 0.1)
    for known in (x, a, b, layer.qweight, layer.qzeros, layer.scales):
        kept.pop(known.data_ptr(), None)
    assert sum(kept.values()) <= 96 * 64 / 8 + 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_is_the_merged_layer_bit_for_bit(dtype: torch.dtype) -> None:
    x, layer, a, b, mask = problem(4)
    x = x.to(dtype)
    bias = torch.randn(96).to(dtype)
    adapter = Adapter(a, b, pack_mask(mask), 0.5)
    y = quant_aware_linear(x, layer.packed(), bias, adapter, 0.3, training=False)
    w_OI = dequantized(merge_packed(layer.packed(), adapter), 64, dtype)
    assert torch.equal(y, F.linear(x, w_OI, bias))


def test_gradient_checkpointing_and_compile() -> None:
    x, layer, a, b, mask = problem(4)
    x, a, b = x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    packed, bits = layer.packed(), pack_mask(mask)

    def f(x: Tensor) -> Tensor:
        return quant_aware_linear(x, packed, None, Adapter(a, b, bits, 0.5), 0.5)

    torch.manual_seed(11)
    plain = torch.autograd.grad(f(x).square().sum(), (x, a, b))
    torch.manual_seed(11)
    torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False).square().sum().backward()
    for gradient, value in zip(plain, (x, a, b), strict=True):
        assert torch.equal(gradient, value.grad)
    compiled = torch.compile(lambda x: quant_aware_linear(x, packed, None, Adapter(a, b, bits, 0.5)), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    eager = quant_aware_linear(x, packed, None, Adapter(a, b, bits, 0.5))
    torch.testing.assert_close(compiled(x), eager)
    ours = torch.autograd.grad(compiled(x).square().sum(), (x, a, b))
    torch.testing.assert_close(ours, torch.autograd.grad(eager.square().sum(), (x, a, b)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert f(x).dtype == torch.bfloat16


@pytest.mark.parametrize("pushed", [-0.01, 0.0, -1e30, 1e30])
@pytest.mark.parametrize("scrambled", [False, True])
def test_learnt_scales_have_a_floor(pushed: float, scrambled: bool) -> None:
    """Scales that training pushed to zero, below, or out of float16 stand for the nearest limit, everywhere alike."""
    x, layer, a, b, mask = problem(4, scrambled=scrambled)
    new = layer.scales.float()
    new[:, ::2] = pushed
    new.requires_grad_()
    adapter = Adapter(a, b, pack_mask(mask), 0.5, None, new)
    low, high = scale_limits(layer.packed())
    assert (low > 0).all() and (high <= torch.finfo(torch.float16).max).all()
    y = quant_aware_linear(x, layer.packed(), None, adapter)
    limited = adapter._replace(new_scales=torch.where(new < low, low, torch.where(new > high, high, new)).detach())
    assert torch.isfinite(y).all() and torch.equal(y, quant_aware_linear(x, layer.packed(), None, limited))
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)))
    assert torch.isfinite(new.grad).all() and new.grad[:, 1::2].all()
    # Descent leads back inside, never further out.
    assert (new.grad[:, ::2] * (1 if pushed > 0 else -1) >= 0).all() and new.grad[:, ::2].any()
    merged = merge_packed(layer.packed(), adapter)
    assert (merged.scales > 0).all() and torch.isfinite(merged.scales).all()
    weight = quant_aware_weight(layer.packed(), adapter, torch.float32)
    assert torch.equal(dequantized(merged, 64, torch.float32), weight) and not weight[~mask].any()


@pytest.mark.parametrize("scrambled", [False, True])
def test_integers_do_not_depend_on_learnt_scales_in_steps(scrambled: bool) -> None:
    """So a scale's gradient is the sum of its group's integers, each times the weight's gradient, exactly."""
    x, layer, a, b, mask = problem(4, scrambled=scrambled)
    adapter = Adapter(a, b, pack_mask(mask), 0.5, None, None, None, True)
    integers = merge_packed(layer.packed(), adapter).qweight
    assert not torch.equal(integers, layer.qweight)
    for factor in (0.3, 1.0, 1.7):
        new = (layer.scales.float() * factor).requires_grad_()
        changed = merge_packed(layer.packed(), adapter._replace(new_scales=new))
        assert torch.equal(changed.qweight, integers) and torch.equal(changed.scales, new.half())
        quant_aware_linear(x, layer.packed(), None, adapter._replace(new_scales=new)).sum().backward()
        units = layer_like(layer, integers).integers().float() - layer.grid().zero_OG[:, layer.g_idx.long()]
        expected = torch.zeros(2, 96).index_add(0, layer.g_idx.long(), (units * x.sum(0)).mT)
        torch.testing.assert_close(new.grad, expected, rtol=1e-4, atol=1e-3)


def layer_like(layer: QuantLinear, qweight: Tensor) -> QuantLinear:
    changed = QuantLinear(layer.in_features, layer.out_features, layer.bits, layer.group_size)
    changed.qweight, changed.qzeros, changed.scales, changed.g_idx = qweight, layer.qzeros, layer.scales, layer.g_idx
    return changed


@pytest.mark.parametrize("in_steps", [False, True])
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_with_fractions_and_without_an_adapter_it_is_the_base_bit_for_bit(
    bits: int, learnt: bool, in_steps: bool
) -> None:
    x, layer, a, b, mask = problem(bits)
    f_IO = torch.randint(-127, 128, (64, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(1)) * mask.mT
    new = layer.scales.float() if learnt else None
    adapter = Adapter(a, torch.zeros_like(b), pack_mask(mask), 0.5, None, new, f_IO, in_steps)
    merged = merge_packed(layer.packed(), adapter)
    assert torch.equal(merged.qweight, layer.qweight) and torch.equal(merged.scales, layer.scales)
    assert torch.equal(quant_aware_linear(x, layer.packed(), None, adapter, training=False), layer(x))
    # There is no dead zone: a tenth of a step moves about a tenth of the weights that are not clamped.
    tenth = adapter._replace(a_RI=torch.full((1, 64), 0.2), b_OR=torch.ones(96, 1), in_steps=True)
    moved = layer_like(layer, merge_packed(layer.packed(), tenth).qweight).integers() != layer.integers()
    assert not moved[~mask].any() and 0.03 < float(moved[mask].float().mean()) < 0.13
    dead = tenth._replace(fractions=None)
    assert torch.equal(merge_packed(layer.packed(), dead).qweight, layer.qweight)


def test_training_at_a_huge_rate_keeps_learnt_scales_finite() -> None:
    x, layer, a, b, mask = problem(4)
    new = layer.scales.float().requires_grad_()
    optimizer = torch.optim.AdamW([new], lr=1.0)
    adapter = Adapter(a, b, pack_mask(mask), 0.5, None, new)
    least = []
    for _ in range(20):
        loss = quant_aware_linear(x, layer.packed(), None, adapter).square().mean()
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        least.append(new.detach().min())
    assert torch.isfinite(new).all() and min(least) < 0  # the parameters did cross zero
    merged = merge_packed(layer.packed(), adapter)
    assert (merged.scales > 0).all() and torch.isfinite(merged.scales).all()
