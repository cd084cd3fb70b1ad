"""Properties of the grid and of packing, for all bit widths."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_model
from torch import Tensor

import sqft
from sqft.kernels.packed import pack_words, unpack_words, word_count
from sqft.quantization.grid import SHRINKS, GridSpec, fit
from sqft.quantization.linear import QuantLinear
from sqft.quantization.rtn import rtn

BITS = (2, 3, 4, 8)
SPECS = st.builds(GridSpec, st.sampled_from(BITS), st.sampled_from([32, 64, -1]), st.booleans(),
                  st.sampled_from(["none", "mse"]), st.sampled_from([None, 4, 7]), st.sampled_from([0, 1]))  # fmt: skip


def weights(seed: int, rows: int = 5, columns: int = 64) -> Tensor:
    """Groups of all sorts: ordinary, one-sided, all zero, tiny, with an outlier, half pruned."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g) * 10 ** float(torch.randn(1, generator=g))
    w[1] = w[1].abs()
    w[2, :32] = 0
    w[3, ::7] *= 30
    w[4] *= torch.rand(columns, generator=g) < 0.5
    return w


@settings(deadline=None, max_examples=60)
@given(SPECS, st.integers(0, 10**6))
def test_zero_is_on_the_grid_and_rounding_is_to_the_nearest(spec: GridSpec, seed: int) -> None:
    w = weights(seed)
    grid = fit(w, spec)
    assert grid.scale_OG.dtype == torch.float16 and (grid.scale_OG > 0).all()
    assert grid.zero_OG.dtype == torch.uint8 and int(grid.zero_OG.max()) <= spec.largest
    assert int(grid.zero_OG.min()) >= spec.min_zero
    if spec.clip == "none" and spec.scale_bits is None and spec.bits > 2:  # the range is covered, also without 0
        clipped = (w - grid.dequantize(grid.integers(w))).abs() / grid.spread(grid.scale_OG, w.shape[1])
        assert float(clipped.max()) <= 1.02
    assert not grid.dequantize(grid.integers(torch.zeros_like(w))).any()
    q = grid.integers(w)
    assert int(q.max()) <= spec.largest
    once = grid.dequantize(q)
    assert torch.equal(grid.integers(once), q)
    # No other integer is nearer.
    error = (w - once).abs()
    for other in range(spec.largest + 1) if spec.bits < 8 else (0, 100, 255):
        assert (error <= (w - grid.dequantize(torch.full_like(q, other))).abs() * (1 + 1e-5) + 1e-7).all()
    # Monotone: a larger weight never gets a smaller integer.
    assert (grid.integers(w + w.abs() * 0.1) >= q).all()
    if spec.symmetric:
        assert (grid.zero_OG == 2 ** (spec.bits - 1)).all()
    if spec.scale_bits:
        mantissa, _ = torch.frexp(grid.scale_OG[grid.scale_OG > 1e-4].float())
        assert torch.equal((mantissa * 2**spec.scale_bits).round(), mantissa * 2**spec.scale_bits)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(BITS), st.booleans(), st.integers(0, 10**6))
def test_searched_ranges_are_not_worse(bits: int, symmetric: bool, seed: int) -> None:
    w = weights(seed)
    plain, searched = (
        (grid := fit(w, GridSpec(bits, 32, symmetric, clip))).dequantize(grid.integers(w)) for clip in ("none", "mse")
    )
    power = [(w - q).abs().square().view(5, 2, 32).sum(-1) for q in (plain, searched)]
    assert (power[1] <= power[0] * (1 + 1e-5)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, -1])
@pytest.mark.parametrize("clip", ["mse", "hessian"])
def test_the_chosen_range_is_the_one_of_least_error(clip: str, size: int, symmetric: bool) -> None:
    """Against a naive search in float64, group by group and shrink by shrink: no other loses less."""
    w, g = weights(7), torch.Generator().manual_seed(1)
    x = (torch.randn(200, 64, generator=g) @ torch.randn(64, 64, generator=g)).double()
    spec = GridSpec(3, size, symmetric, clip)
    columns = spec.columns(64)
    grid = fit(w, spec, (x.mT @ x).float())
    for row, group in itertools.product(range(len(w)), range(64 // columns)):
        part = slice(group * columns, (group + 1) * columns)
        values = w[row, part].double()
        h = x[:, part].mT @ x[:, part] if clip == "hessian" else x[:, part].square().sum(0).diag()
        lost = {}
        for shrink in SHRINKS:
            low, high = min(float(values.min()), 0) * shrink, max(float(values.max()), 0) * shrink
            low, high = (min(low, -high), max(-low, high)) if symmetric else (low, high)
            low, high = (low, high) if high > low else (-1, 1)
            scale = torch.tensor((high - low) / spec.largest).half()
            zero = 4 if symmetric else max(0, min(spec.largest, round(-low / float(scale))))
            e = ((values / scale.double()).round().clamp(-zero, spec.largest - zero)) * scale.double() - values
            lost[float(scale), zero] = float(e @ h @ e)
        chosen = lost[float(grid.scale_OG[row, group]), int(grid.zero_OG[row, group])]
        assert chosen <= min(lost.values()) * (1 + 1e-4) + 1e-9


def test_a_hessian_clip_needs_a_hessian(tokens: torch.Tensor) -> None:
    with pytest.raises(sqft.UsageError, match="clip hessian needs a method that knows"):
        fit(torch.ones(2, 64), GridSpec(clip="hessian"))
    with pytest.raises(sqft.UsageError, match="clip hessian does not go with method rtn"):
        sqft.quantize(pico_model(), sqft.QuantizeConfig(method="rtn", clip="hessian"), tokens)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BITS), st.integers(1, 150), st.integers(1, 9), st.integers(0, 10**6))
def test_packing_round_trips_also_ragged_widths(bits: int, count: int, columns: int, seed: int) -> None:
    q = torch.randint(2**bits, (count, columns), generator=torch.Generator().manual_seed(seed))
    words = pack_words(q, bits)
    assert words.dtype == torch.int32 and words.shape == (word_count(count, bits), columns)
    assert torch.equal(unpack_words(words, count, bits), q.int())
    # The layout: a stream of bits, the lowest first.
    stream = [sum(int(v) << (bits * k) for k, v in enumerate(q[:, c])) for c in range(columns)]
    for c, value in enumerate(stream):
        assert [int(w) & 0xFFFFFFFF for w in words[:, c]] == [
            (value >> (32 * k)) & 0xFFFFFFFF for k in range(len(words))
        ]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_quant_linear_is_its_dequantized_weight(bits: int, symmetric: bool) -> None:
    w = weights(3, rows=32)
    w = torch.cat([w, w.flip(1)])
    quantized = rtn(w, None, GridSpec(bits, 32, symmetric))
    layer = QuantLinear.from_quantized(quantized, 32, symmetric, bias=torch.arange(64.0))
    assert torch.equal(layer.integers(), quantized.q_OI)
    assert torch.equal(layer.dequantize(), quantized.weight())
    assert torch.equal(layer.grid().zero_OG, quantized.grid.zero_OG)
    x = torch.randn(3, 7, 64, requires_grad=True)
    y = layer(x)
    expected = torch.nn.functional.linear(x, quantized.weight(), layer.bias)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    (ours,), (theirs,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(ours, theirs)
    half = layer.to(torch.bfloat16)
    assert half.scales.dtype == torch.float16 and half.bias.dtype == torch.bfloat16
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_the_clamp_keeps_a_symmetric_maximum_from_overflowing() -> None:
    """w / scale + zero rounds to 2^bits at the maximum of a symmetric range."""
    w = torch.tensor([[1.0] + [0.1] * 31])
    assert int(fit(w, GridSpec(4, 32, True)).integers(w).max()) == 15


def test_group_sizes_that_do_not_fit_name_those_that_do() -> None:
    with pytest.raises(sqft.UsageError, match=r"128 does not divide 576 inputs: choose from 32, 64, -1"):
        fit(torch.ones(2, 576), GridSpec(group_size=128))
