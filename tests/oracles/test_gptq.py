"""GPTQ against a naive float64 version written from the papers: column by column, with explicit inverses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sqft
from sqft.calibration.surgeon import inverse_factor
from sqft.kernels.columns import fractions
from sqft.quantization.gptq import DAMPING, gptq
from sqft.quantization.grid import GridSpec, fit
from sqft.quantization.method import Quantized
from sqft.quantization.rtn import rtn


def problem(seed: int, rows: int = 12, inputs: int = 64, tokens: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the Hessian of correlated inputs, and a mask of half of the weights."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=g) @ (torch.randn(inputs, inputs, generator=g) * 0.3 + torch.eye(inputs))
    x *= torch.rand(inputs, generator=g) + 0.2
    w = torch.randn(rows, inputs, generator=g)
    return w, x.mT @ x, torch.rand(rows, inputs, generator=g) < 0.5


def naive(w: Tensor, h: Tensor, mask: Tensor | None, spec: GridSpec, act_order: bool) -> tuple[Tensor, Tensor]:
    """De-quantized weights in float64, and what rounding took away of each in steps: after each column, the rest
    follows by the inverse of the remaining Hessian."""
    h = h.double() + DAMPING * h.double().diagonal().mean() * torch.eye(len(h))
    mask = torch.ones_like(w, dtype=torch.bool) if mask is None else mask
    w = w.double() * mask
    size = spec.columns(w.shape[1])
    order = h.diagonal().argsort(descending=True, stable=True).tolist() if act_order else list(range(len(h)))
    static = fit(w, spec)
    out, fractions = torch.zeros_like(w), torch.zeros_like(w)
    for place, j in enumerate(order):
        if act_order or size == w.shape[1]:
            scale, zero = static.scale_OG[:, j // size].double(), static.zero_OG[:, j // size].double()
        elif j % size == 0:
            grid = fit(w[:, j : j + size], spec)
            scale, zero = grid.scale_OG[:, 0].double(), grid.zero_OG[:, 0].double()
        q = ((w[:, j] / scale).round() + zero).clamp(0, spec.largest)
        out[:, j] = torch.where(mask[:, j], (q - zero) * scale, 0)
        fractions[:, j] = (w[:, j] / scale - (q - zero)).clamp(-0.5, 0.5) * mask[:, j]
        rest = order[place:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        w[:, rest] -= torch.outer((w[:, j] - out[:, j]) / inverse[0, 0], inverse[0])
    return out, fractions


def loss(w: Tensor, quantized: Tensor, h: Tensor) -> float:
    """|| X (W - Q)^T ||^2."""
    d = (w - quantized).double()
    return float(((d @ h.double()) * d).sum())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", [GridSpec(4, 32), GridSpec(3, 64, True), GridSpec(2, -1), GridSpec(8, 32, True)])
def test_equals_the_naive_version(spec: GridSpec, act_order: bool, masked: bool) -> None:
    for seed in range(3):
        w, h, mask = problem(seed, inputs=192)  # more than one block of lazy updates
        mask = mask if masked else None
        expected, fractions = naive(w, h, mask, spec, act_order)
        exact = gptq(w.double(), h, mask, spec, act_order=act_order)
        torch.testing.assert_close(exact.weight().double(), expected)
        assert exact.fractions_OI is not None and fractions.abs().max() > 0.45
        torch.testing.assert_close(exact.fractions_OI.double() / 256, fractions, rtol=0, atol=1.001 / 256)
        # In float32 a weight in the middle of two grid points may fall to the other side, and move those after it.
        ours = gptq(w, h, mask, spec, act_order=act_order).weight()
        w = w * mask if masked else w
        assert loss(w, ours, h) == pytest.approx(loss(w, expected, h), rel=0.05)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_loses_less_than_round_to_nearest(bits: int, masked: bool, act_order: bool) -> None:
    spec = GridSpec(bits, 32)
    for seed in range(4):
        w, h, mask = problem(seed, rows=32)
        mask = mask if masked else None
        base = w * mask if masked else w
        assert loss(base, gptq(w, h, mask, spec, act_order=act_order).weight(), h) < loss(
            base, rtn(w, mask, spec).weight(), h
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", [gptq, rtn])
def test_every_pruned_weight_is_exactly_zero(bits: int, method) -> None:
    w, h, mask = problem(1)
    quantized: Quantized = method(w, *([h] if method.needs else []), mask, GridSpec(bits, 32))
    assert not quantized.weight()[~mask].any() and quantized.weight().any()
    assert quantized.fractions_OI is not None
    assert not quantized.fractions_OI[~mask].any() and quantized.fractions_OI.any()


def test_an_integer_and_its_fraction_round_to_the_integer() -> None:
    """Also where the weight lay in the middle of two points, or far beyond the last one."""
    units = torch.cat([torch.arange(-40, 40) / 2, torch.randn(2000) * 8, torch.tensor([-0.5, 0.5, 1e9, -1e9])])
    q = units.round().clamp(-7, 8)
    found = fractions(units - q)
    assert found.dtype == torch.int8 and found.min() == -127 and found.max() == 127
    assert torch.equal((q + found.float() / 256).round(), q)
    inside = (units - q).abs() <= 0.5
    torch.testing.assert_close((q + found.float() / 256)[inside], units[inside], rtol=0, atol=1 / 256)


def test_handing_on_the_corrections_of_pruned_weights_is_better_than_dropping_them() -> None:
    ratios = []
    for seed in range(8):
        w, h, mask = problem(seed)
        kept, dropped = (gptq(w, h, mask, GridSpec(3, 32), propagate=p).weight() for p in (True, False))
        ratios.append(loss(w * mask, kept, h) / loss(w * mask, dropped, h))
    assert sum(ratios) / len(ratios) < 1


def test_inputs_that_were_never_active_are_rounded_to_nearest() -> None:
    w, h, _ = problem(2)
    h[5], h[:, 5] = 0, 0
    quantized = gptq(w, h, None, GridSpec(4, 32), act_order=True)
    assert torch.equal(quantized.q_OI[:, 5], quantized.grid.integers(w)[:, 5])
    assert torch.isfinite(quantized.weight()).all()


def test_damping_grows_until_the_hessian_can_be_factorized() -> None:
    h = torch.ones(32, 32) - 0.3 * torch.eye(32)  # indefinite: needs more than 1 %
    assert torch.isfinite(inverse_factor(h, DAMPING)).all()
    with pytest.raises(sqft.SqftError, match="not finite"):
        inverse_factor(torch.full((4, 4), float("nan")), DAMPING)
