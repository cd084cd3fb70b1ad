"""Every operator, on every device and dtype, against a naive float64 formula; and what torch asks of operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import pico_model
from support.rounding import of_16_bits
from torch import Tensor, nn

import sqft
from sqft.kernels import compact, dispatch, ops
from sqft.kernels.cpu.library import FEW_TOKENS
from sqft.kernels.packed import Packed, pack_mask, unpack_mask
from sqft.kernels.reference import Adapter
from sqft.quantization.grid import Grid, GridSpec
from sqft.quantization.linear import QuantLinear
from sqft.quantization.rtn import Quantized, rtn
from sqft.registry import KERNELS

DEVICES = ["cpu", *({str(torch.accelerator.current_accelerator())} if torch.accelerator.is_available() else ())]
OPERATORS = [name for name in KERNELS if "." not in name]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
T, O, I, R, SCALE = 40, 130, 96, 5, 0.5  # noqa: E741


class Problem:
    """A layer in float64 and as the operators take it: half pruned, ragged sizes, a slice of B, groups of 32."""

    def __init__(self, device: str, dtype: torch.dtype, bits: int = 4, scrambled: bool = False, learnt: bool = False):
        g = torch.Generator().manual_seed(bits)
        mask = torch.rand(O, I, generator=g) < 0.5
        w = torch.randn(O, I, generator=g) * mask
        q_OI, grid, f_OI = rtn(w, mask, GridSpec(bits, 32))
        if scrambled:
            order = torch.randperm(I, generator=g)
            group = torch.arange(I).div(32, rounding_mode="floor")[order]
            q_OI, grid, mask, w = (
                q_OI[:, order],
                Grid(bits, grid.scale_OG, grid.zero_OG, group),
                mask[:, order],
                w[:, order],
            )
            f_OI = f_OI[:, order]
        layer = QuantLinear.from_quantized(Quantized(q_OI, grid), 32, False)
        new = layer.scales.float() * (0.9 + 0.2 * torch.rand(layer.scales.shape, generator=g)) if learnt else None
        self.mask, self.dtype, self.grid, self.q_OI, self.f_OI = mask, dtype, grid, q_OI, f_OI
        self.x, self.dy, self.bias = (torch.randn(*s, generator=g).to(dtype) for s in ((T, I), (T, O), (O,)))
        a, b = torch.randn(R, I, generator=g), torch.randn(O, R + 2, generator=g)[:, :R] * 0.2
        self.w = w.to(dtype)
        self.adapter = Adapter(
            *(to(v, device) for v in (a, b, pack_mask(mask))), SCALE, to(self.w, device), to(new, device)
        )
        self.packed = Packed(*(to(v, device) for v in layer.packed()[:4]), bits)
        self.dx, self.ddy, self.dbias = (to(v, device) for v in (self.x, self.dy, self.bias))

    def spread(self, value_OG: Tensor) -> Tensor:
        return self.grid.spread(value_OG, I).double()

    def base(self, kind: str = "") -> Tensor:
        """What the integers mean, with their fractions or not; or the un-quantized weight."""
        if "float base" in kind:
            return self.w.double()
        q_OI = self.q_OI.double() + (self.f_OI.double() / 256 if "fractions" in kind else 0)
        return (q_OI - self.spread(self.grid.zero_OG)) * self.spread(self.grid.scale_OG)

    def start(self, kind: str) -> Adapter:
        """The adapter with the base that the kind names."""
        device = self.adapter.a_RI.device
        return self.adapter._replace(
            base=self.adapter.base if "float base" in kind else None, in_steps="steps" in kind,
            fractions=self.f_OI.mT.contiguous().to(device) if "fractions" in kind else None,
        )  # fmt: skip

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        return SCALE * self.mask * (b @ a)

    def quantized(self, kind: str, a: Tensor, b: Tensor, scales_OI: Tensor) -> Tensor:
        """Straight-through rounding, autograd's own clamp."""
        zero = self.spread(self.grid.zero_OG)
        if "steps" in kind:
            t = self.base(kind) / self.spread(self.grid.scale_OG) + self.delta(a, b)
        else:
            t = (self.base(kind) + self.delta(a, b)) / scales_OI
        return scales_OI * torch.clamp(t + (t.round() - t).detach(), -zero, self.packed.largest - zero)

    def doubles(self) -> list[Tensor]:
        new = self.adapter.new_scales
        leaves = [self.adapter.a_RI, self.adapter.b_OR, *([] if new is None else [new.half()])]
        return [v.detach().cpu().double().requires_grad_() for v in leaves]


def to(tensor: Tensor | None, device: str) -> Any:
    return tensor if tensor is None else tensor.to(device)


def near(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    largest = expected.detach().abs().max()
    torch.testing.assert_close(ours.detach().cpu().double() / largest, expected.detach() / largest, rtol=0,
                               atol=TOLERANCE[dtype])  # fmt: skip


def check_product(run: Any, device: str, dtype: torch.dtype) -> None:
    p = Problem(device, dtype)
    y = p.x.double() @ p.w.double().mT
    near(run(p.dx, p.adapter.base, p.dbias), y + p.bias.double(), dtype)
    near(run(p.dx, p.adapter.base.mT.contiguous().mT, None), y, dtype)
    near(run(p.dx[:, :40], p.adapter.base[:, :40], None), p.x[:, :40].double() @ p.w[:, :40].double().mT, dtype)


def check_masked_weight(run: Any, device: str, dtype: torch.dtype) -> None:
    p = Problem(device, dtype)
    delta = p.delta(*p.doubles())
    for adapter, expected in ((p.adapter, p.w.double() + delta), (p.adapter._replace(base=None), delta)):
        w = run(adapter, dtype)
        near(w, expected, dtype)
        assert w.dtype == dtype and not w.cpu()[~p.mask].any()


def check_masked_gradients(run: Any, device: str, dtype: torch.dtype) -> None:
    p = Problem(device, dtype)
    a, b = p.doubles()
    (p.x.double() @ p.delta(a, b).mT).backward(p.dy.double())
    for ours, expected in zip(run(p.ddy, p.dx, p.adapter), (a.grad, b.grad), strict=True):
        near(ours, expected, torch.float32 if dtype == torch.float64 else dtype)
        assert ours.dtype == torch.float32  # as A and B


STARTS = [f"{learnt}{start}{units}" for learnt in ("", "learnt scales ") for start in ("", "float base ", "fractions ")
          for units in ("", "steps")]  # fmt: skip
SOME_GRIDS = [(4, False), (4, True), (2, False)]
GRIDS = [(bits, scrambled) for bits in (2, 3, 4, 8) for scrambled in (False, True)]


def check_dequantized(run: Any, device: str, dtype: torch.dtype) -> None:
    for grid in GRIDS:
        p = Problem(device, dtype, *grid)
        assert torch.equal(run(p.packed, I, dtype).cpu(), p.base().to(dtype))  # computed exactly, rounded once


def check_quant_aware_weight(run: Any, device: str, dtype: torch.dtype) -> None:
    for grid, kind in [(grid, kind) for grid in GRIDS for kind in STARTS]:
        p = Problem(device, dtype, *grid, "learnt" in kind)
        a, b, *new = p.doubles()
        adapter, scales = p.start(kind), p.spread(new[0].detach().mT if new else p.grid.scale_OG)
        w = run(p.packed, adapter, dtype)
        near(w, p.quantized(kind, a, b, scales), dtype)
        assert w.dtype == dtype and not w.cpu()[~p.mask].any()
        merged = ops.merge_packed(p.packed, adapter)
        assert torch.equal(ops.dequantized(merged, I, dtype), w)  # bit for bit


def check_quant_aware_gradients(run: Any, device: str, dtype: torch.dtype) -> None:
    for bits, scrambled, kind in [(*grid, kind) for grid in SOME_GRIDS for kind in STARTS]:
        p = Problem(device, dtype, bits, scrambled, "learnt" in kind)
        a, b, *new = p.doubles()
        adapter, group_I = p.start(kind), torch.arange(I) // 32 if p.grid.group_I is None else p.grid.group_I
        scales = new[0].mT.index_select(1, group_I) if new else p.spread(p.grid.scale_OG)
        w = p.quantized(kind, a, b, scales)
        (p.x.double() @ w.mT).backward(p.dy.double())
        da, db, ds, w_OI = run(p.ddy, p.dx, p.packed, adapter)
        assert (ds is None) == (not new)
        assert torch.equal(w_OI, ops.quant_aware_weight(p.packed, adapter, dtype))
        for ours, expected in zip((da, db, ds), (a, b, *new), strict=False):
            near(ours, expected.grad, dtype)


def check_compact_linear(run: Any, device: str, dtype: torch.dtype) -> None:
    p = Problem(device, dtype)
    packed = to(pack_mask(p.mask), device)
    grid = (to(p.grid.scale_OG, device).float(), to(p.grid.zero_OG, device), 32)
    floats = to(p.w.half(), device)
    nothing = torch.zeros(0, device=device)
    for made, *rest, w in ((compact.pack(to(p.q_OI, device), packed, 4), *grid, p.base()),
                           (compact.pack(floats, packed), nothing, nothing, 0, p.w.half().double())):  # fmt: skip
        for tokens in (2, T, FEW_TOKENS + 1):
            x = p.x.repeat(tokens // T + 1, 1)[:tokens]
            found = run(to(x, device), compact.CompactWeight(made, compact.starts(made), *rest)).cpu().double()
            exact = x.double() @ w.mT
            if made.bits:  # a kernel may round x
                exact += (found - exact).clamp(-(most := of_16_bits(x, w)), most)
            near(found, exact, dtype)


def check_round_columns(run: Any, device: str, dtype: torch.dtype) -> None:
    """Column after column in float64; weights in half precision are rounded in float32. Of a row in which an integer was
    tipped by how sums are rounded nothing is compared."""
    dtype = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(24, 50, generator=generator).to(dtype)
    u = (0.1 * torch.randn(24, 24, generator=generator)).triu().fill_diagonal_(0.8).to(dtype)
    scale, zero = torch.rand(16, 50, generator=generator).add(0.1), torch.randint(0, 16, (16, 50), generator=generator)
    mask = torch.rand(16, 50, generator=generator) < 0.6
    changed = to(w.clone(), device)
    grid = [to(v.to(dtype), device) for v in (scale, zero)]
    q, f, errors = (v.cpu() for v in run(changed, to(u, device), range(8, 24), *grid, to(mask, device), 15))
    expected, tipped = w.double(), torch.zeros(50, dtype=torch.bool)
    for j in range(8, 24):
        s, z = scale[j - 8].double(), zero[j - 8].double()
        units = expected[j] / s + z
        right = torch.where(mask[j - 8], units.round().clamp(0, 15), z)
        tipped |= q[j - 8] != right
        fraction = torch.where(mask[j - 8], ((units - right) * 256).round().clamp(-127, 127), 0)
        e = (expected[j] - (right - z) * s) / u[j, j].double()
        expected[j] = (right - z) * s
        expected[j + 1 :] -= u[j, j + 1 :].double()[:, None] * e
        near(errors[j - 8, ~tipped], e[~tipped], dtype)
        assert bool(((f[j - 8] - fraction)[~tipped].abs() <= 1).all())
    near(changed[:, ~tipped.to(changed.device)], expected[:, ~tipped], dtype)
    assert tipped.sum() < 3 and bool((q == zero)[~mask].all())


CASES = [
    (op, device, dtype) for op in OPERATORS for device in DEVICES for dtype in TOLERANCE
    if dtype != torch.float64 or ("quant" not in op and not device.startswith("mps"))
]  # fmt: skip  # packed weights are built in float32, and mps has no float64


@pytest.mark.parametrize(("op", "device", "dtype"), CASES, ids=str)
def test_every_operator_on_every_device_and_dtype(op: str, device: str, dtype: torch.dtype) -> None:
    """The reference, and the device's own implementation where it has one."""
    check = globals()[f"check_{op}"]  # an operator without a check fails here
    kind = torch.device(device).type
    for run in {KERNELS[op], dispatch.kernel(op, kind)}:
        check(run, device, dtype)


@pytest.mark.parametrize(("training", "dropout"), [(True, 0.3), (False, 0.0)])
@pytest.mark.parametrize("kind", [
    "float", "packed", "quantization-aware", "scrambled", "learnt scales", "float base", "fractions", "steps",
    "learnt scales, fractions, steps",
])  # fmt: skip
def test_opcheck(kind: str, training: bool, dropout: float) -> None:
    """Schema, fakes, autograd registration and compilation of both operators, by torch's own check."""
    p = Problem("cpu", torch.float32, 4, kind == "scrambled", "learnt" in kind)
    x, bias = p.x.view(4, 10, I).requires_grad_(), p.bias.requires_grad_()
    words = [] if kind == "float" else [tensor for tensor in p.packed[:4] if tensor is not None]
    adapter = p.start("float base" if "float" in kind else kind)
    leaves = [v for v in (adapter.a_RI, adapter.b_OR, adapter.new_scales) if v is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    fields = (None, None, None, SCALE, None, None, None, False) if kind == "packed" else tuple(adapter)
    shared = (words, 4, *fields, dropout, torch.tensor(3))
    torch.library.opcheck(torch.ops.sqft.linear.default, (x, bias, *shared, training))
    dy = p.dy.view(4, 10, O)
    torch.library.opcheck(torch.ops.sqft.linear_backward.default, (dy, x.detach(), *detached(shared), training))


def detached(arguments: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, arguments)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["SparseLoraLinear", "QuantAwareLoraLinear", "QuantLinear"])
def test_outputs_may_be_changed_in_place(kind: str, dropout: float) -> None:
    """As falcon does, which adds the attention's output to the MLP's."""
    model: Any = pico_model()
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    if kind != "SparseLoraLinear":
        sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=32))
    if kind != "QuantLinear":
        aware = kind == "QuantAwareLoraLinear"
        config = sqft.SqftConfig(r=4, lora_dropout=dropout, quantization_aware=aware, init_lora_weights=False)
        model = sqft.attach(model, config)
    layer = next(module for module in model.train().modules() if type(module).__name__ == kind)
    results = []
    for add in (Tensor.add_, Tensor.add):
        x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
        torch.manual_seed(1)
        y = layer(x)
        assert not y._is_view()
        y = add(y, 1.0)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_package_adds_a_kernel_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an entry point ``operator.device``; forward and merging both use it, other devices do not."""

    class Point:
        name = "masked_weight.cpu"

        @staticmethod
        def load() -> Any:
            return lambda adapter, dtype: KERNELS["masked_weight"](adapter, dtype) * 2

    monkeypatch.setitem(KERNELS._plugins, Point.name, Point)
    dispatch.kernel.cache_clear()
    try:
        p = Problem("cpu", torch.float32)
        w = ops.masked_weight(p.adapter, torch.float32)
        assert torch.equal(w, 2 * KERNELS["masked_weight"](p.adapter, torch.float32))
        assert torch.equal(ops.linear(p.x, None, None, p.adapter), nn.functional.linear(p.x, w))
        assert dispatch.kernel("masked_weight", "xpu") is KERNELS["masked_weight"]
    finally:
        dispatch.kernel.cache_clear()


@pytest.mark.parametrize("kind", ["float", "quantization-aware"])
def test_backward_under_autocast_is_as_exact_as_without(kind: str) -> None:
    """Autocast would build the weight in bfloat16."""
    p = Problem("cpu", torch.float32)
    gradients = []
    for enabled in (False, True):
        a, b, x = p.adapter.a_RI.clone().requires_grad_(), p.adapter.b_OR.clone().requires_grad_(), p.x.clone()
        packed, base = (None, p.adapter.base) if kind == "float" else (p.packed, None)
        y = ops.linear(x.requires_grad_(), None, packed, p.adapter._replace(a_RI=a, b_OR=b, base=base), training=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            if packed is not None:
                w = ops.quant_aware_weight(packed, p.adapter._replace(base=None), torch.float32)
            else:
                w = ops.masked_weight(p.adapter, torch.float32)
            gradients.append([w, *torch.autograd.grad(y, (x, a, b), p.dy)])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
def test_masks_are_packed_on_their_own_device(device: str) -> None:
    packed = pack_mask(torch.ones(3, 9, dtype=torch.bool, device=device))
    assert packed.device.type == torch.device(device).type and packed.shape == (3, 2)
    assert unpack_mask(packed, 9).device == packed.device
