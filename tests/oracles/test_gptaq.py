"""GPTAQ against a naive float64 version made from inputs: after each column a least-squares problem over the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from pico import pico_model
from torch import Tensor

import sqft
from sqft.calibration.statistics import Hessian, Paired, Products
from sqft.models.discover import describe
from sqft.quantization.gptq import DAMPING, LEAN, gptaq, gptq
from sqft.quantization.grid import GridSpec, fit


def problem(seed: int, rows: int = 8, inputs: int = 64, tokens: int = 300) -> dict[str, Tensor]:
    """A weight, a mask of half of it, and inputs of a quantized model and of the dense one; float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=g) @ (torch.randn(inputs, inputs, generator=g) * 0.3 + torch.eye(inputs))
    x *= torch.rand(inputs, generator=g) + 0.2
    dense = x @ (torch.eye(inputs) + 0.03 * torch.randn(inputs, inputs, generator=g))
    dense += 0.1 * torch.randn(tokens, inputs, generator=g)
    w, mask = torch.randn(rows, inputs, generator=g), torch.rand(rows, inputs, generator=g) < 0.5
    return {"w": w.double(), "mask": mask, "x": x.double(), "dense": dense.double()}


def products(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return p["x"].mT @ p["x"], p["dense"].mT @ p["x"]


def naive(p: dict[str, Tensor], mask: Tensor | None, spec: GridSpec, act_order: bool, lean: float) -> Tensor:
    """Column after column, those that are left move by d, so that X^_left d is nearest to what column j leaves of the
    outputs: first a share of what its input has drifted from the dense model's, (x_j - x^_j) w_j; then, with the weights
    that this gives, its rounding error, x^_j (w_j - q_j)."""
    x, dense, w = p["x"], p["dense"], p["w"].clone()
    mask = torch.ones_like(w, dtype=torch.bool) if mask is None else mask
    w *= mask
    given = w.clone()
    h, power = x.mT @ x, x.square().sum(0)
    damp = (DAMPING * power.mean()).sqrt()
    size = spec.columns(w.shape[1])
    order = power.argsort(descending=True, stable=True).tolist() if act_order else list(range(len(power)))
    grid, out = fit(w, spec, h), torch.zeros_like(w)

    def make_good(rest: list[int], left_TO: Tensor) -> None:
        if rest:
            system = torch.cat([x[:, rest], damp * torch.eye(len(rest), dtype=x.dtype)])
            wanted = torch.cat([left_TO, left_TO.new_zeros(len(rest), len(w))])
            w[:, rest] += torch.linalg.lstsq(system, wanted, driver="gels").solution.mT

    for place, j in enumerate(order):
        make_good(order[place + 1 :], lean * torch.outer(dense[:, j] - x[:, j], given[:, j]))
    for place, j in enumerate(order):
        if not act_order and j % size == 0:
            part = slice(j, j + size)
            grid = fit(w[:, part], spec, h[part, part])
        scale, zero = (v[:, j // size if act_order else 0].double() for v in (grid.scale_OG, grid.zero_OG))
        q = ((w[:, j] / scale).round() + zero).clamp(0, spec.largest)
        out[:, j] = torch.where(mask[:, j], (q - zero) * scale, 0)
        make_good(order[place + 1 :], torch.outer(x[:, j], w[:, j] - out[:, j]))
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", [GridSpec(3, 32, clip="mse"), GridSpec(4, 32, True, clip="hessian")])
def test_equals_the_naive_version(spec: GridSpec, act_order: bool, masked: bool) -> None:
    p = problem(0, inputs=160)  # more than one block of lazy updates
    mask = p["mask"] if masked else None
    lean = LEAN if act_order else 1.0
    expected = naive(p, mask, spec, act_order, lean)
    found = gptaq(p["w"], products(p), mask, spec, act_order=act_order, lean=lean).weight().double()
    torch.testing.assert_close(found, expected)
    assert not masked or not found[~p["mask"]].any()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("propagate", [False, True])
def test_is_gptq_where_nothing_drifts(act_order: bool, propagate: bool) -> None:
    p = problem(1)
    h = products(p)[0].float()
    for mask in (None, p["mask"]):
        options = {"act_order": act_order, "propagate": propagate}
        ours, other = (method(p["w"].float(), value, mask, GridSpec(4, 32, clip="mse"), **options)
                       for method, value in ((gptaq, (h, h.clone())), (gptq, h)))  # fmt: skip
        assert torch.equal(ours.q_OI, other.q_OI) and torch.equal(ours.grid.scale_OG, other.grid.scale_OG)


@pytest.mark.parametrize("masked", [False, True])
def test_comes_nearer_to_the_dense_outputs(masked: bool) -> None:
    ratios = []
    for seed in range(6):
        p = problem(seed)
        mask = p["mask"] if masked else None
        w = p["w"] * p["mask"] if masked else p["w"]
        target = p["dense"] @ w.mT
        found = (gptaq(w, products(p), mask, GridSpec(4, 32), lean=1.0), gptq(w, products(p)[0], mask, GridSpec(4, 32)))
        lost = [(p["x"] @ each.weight().double().mT - target).square().sum() for each in found]
        ratios.append(float(lost[0] / lost[1]))
    assert max(ratios) < 0.8


def test_its_statistic_goes_with_that_of_repair() -> None:
    x, dense = torch.randn(2, 3, 7, 8)
    flat, other = x.flatten(0, 1), dense.flatten(0, 1)
    alone, paired, hessian = Products(), Paired(Products, "a layer"), Paired(Hessian, "a layer")
    for statistic in (alone, paired, hessian):
        statistic.update(x, dense)
    expected = flat.mT @ flat, other.mT @ flat
    for found in (alone.value(), paired.value(), paired.products(), hessian.products()):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(hessian.value(), expected[0])


@pytest.mark.parametrize("repair", ["none", "layer"])
def test_of_a_whole_model(repair: str, tokens: Tensor) -> None:
    """The first layers see what the un-quantized model's see: there it is GPTQ. Zeros are kept, and the outputs are
    nearer."""
    sparse = pico_model()
    sqft.sparsify(sparse, sqft.SparsifyConfig(), tokens)
    expected, found = sparse(tokens).logits.detach(), {}
    for method in ("gptq", "gptaq"):
        model = copy.deepcopy(sparse)
        config = sqft.QuantizeConfig(method=method, group_size=32, repair=repair)
        metrics = sqft.quantize(model, config, tokens)
        assert metrics["zeros_kept"] == 1.0 and metrics["pruned"] > 0
        lost = float((model(tokens).logits - expected).detach().norm())
        found[method] = {weight.name: weight.module.qweight for weight in describe(model).weights()}, lost
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    (before, lost_before), (after, lost_after) = found["gptq"], found["gptaq"]
    assert torch.equal(before[first], after[first]) and not torch.equal(before[last], after[last])
    assert repair == "layer" or lost_after < lost_before
