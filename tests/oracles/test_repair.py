"""Repair on the mask against the exact solution in float64, row by row; and the two streams of activations it needs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pico import pico_model
from torch import Tensor

import sqft
from sqft.calibration.statistics import ColumnNorms, Gradient, Paired
from sqft.calibration.walker import walk
from sqft.models.discover import describe
from sqft.sparsity.method import Pruned, sparsifier
from sqft.sparsity.pattern import Pattern
from sqft.sparsity.repair import DAMPING, LEAN, repair
from sqft.sparsity.wanda import wanda


def problem(seed: int) -> dict[str, Tensor]:
    """Weights, a 50 % mask, and inputs of a dense model and of a pruned one, which drift apart; float64."""
    torch.manual_seed(seed)
    dense_TI = torch.randn(400, 48) @ torch.randn(48, 48)
    x_TI = dense_TI + 0.3 * torch.randn(400, 48)
    w_OI = torch.randn(9, 48).double()
    mask_OI = wanda(w_OI, x_TI.double().norm(dim=0), Pattern(0.5)).mask_OI
    return {"w": w_OI, "mask": mask_OI, "x": x_TI.double(), "dense": dense_TI.double()}


def exact(w_OI: Tensor, mask_OI: Tensor, x_TI: Tensor, target_TI: Tensor) -> Tensor:
    """Least squares on each row's support: the outputs, and sqrt(l) (W - W0) below them."""
    damp = DAMPING * x_TI.square().sum(0).mean()
    rows = []
    for w_I, mask_I in zip(w_OI, mask_OI, strict=True):
        below = damp.sqrt() * torch.eye(len(w_I), dtype=w_I.dtype)
        system = torch.cat([x_TI, below])[:, mask_I]
        found = torch.linalg.lstsq(system, torch.cat([target_TI @ w_I, below @ w_I])).solution
        rows.append(torch.zeros_like(w_I).masked_scatter(mask_I, found))
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(3))
def test_goes_to_the_exact_solution(seed: int) -> None:
    p = problem(seed)
    target = (1 - LEAN) * p["x"] + LEAN * p["dense"]
    expected = exact(p["w"], p["mask"], p["x"], target)
    products = p["x"].mT @ p["x"], p["dense"].mT @ p["x"]
    start = p["w"] * p["mask"]
    torch.testing.assert_close(repair(start, p["w"], p["mask"], *products, iterations=200), expected)
    lost = [(p["x"] @ w.mT - target @ p["w"].mT).square().sum()
            for w in (start, repair(start, p["w"], p["mask"], *products), expected)]  # fmt: skip
    assert lost[1] < 1.02 * lost[2] < 0.7 * lost[0]
    for lean, whole in ((0.0, p["x"]), (1.0, p["dense"])):
        found = repair(start, p["w"], p["mask"], *products, iterations=200, lean=lean)
        torch.testing.assert_close(found, exact(p["w"], p["mask"], p["x"], whole))
    given = start.bfloat16(), p["w"].bfloat16(), p["mask"], *(v.float() for v in products)
    half = repair(*given)
    assert half.dtype == torch.bfloat16 and not half[~p["mask"]].any() and torch.equal(given[0], start.bfloat16())


def test_what_a_statistic_is_given(tokens: Tensor) -> None:
    """The inputs that the changed layers before give, and those of the model as it was."""
    torch.manual_seed(0)
    model = pico_model()
    dense, seen, expected = copy.deepcopy(model), {}, {}

    class Inputs:
        def __init__(self, name: str) -> None:
            self.pairs: list[tuple[Tensor, Tensor]] = []

        def update(self, x: Tensor, dense_x: Tensor) -> None:
            self.pairs.append((x.clone(), dense_x.clone()))

    def change(block: Any, statistics: dict[str, Any]) -> None:
        for name, statistic in statistics.items():
            seen[name] = [torch.cat(parts) for parts in zip(*statistic.pairs, strict=True)]
            block.weights[name].write(block.weights[name].read() * 0.9)

    for _ in walk(describe(model), tokens, 2, Inputs, change, "", torch.device("cpu"), sequential=True, paired=True):
        pass
    for which, live in enumerate((model, dense)):
        for weight in describe(live).weights():
            hook = lambda module, arguments, key=(weight.name, which): expected.update({key: arguments[0]})  # noqa: E731
            weight.module.register_forward_pre_hook(hook)
        live(tokens)
    for (name, which), x in expected.items():
        torch.testing.assert_close(seen[name][which], x, msg=f"{name} {which}")
    statistic = Paired(ColumnNorms, "a layer")
    x, dense_x = seen[name]
    statistic.update(x, dense_x)
    x, dense_x = x.flatten(0, 1), dense_x.flatten(0, 1)
    torch.testing.assert_close(statistic.value(), x.double().norm(dim=0))
    torch.testing.assert_close(statistic.products(), (x.mT @ x, dense_x.mT @ x))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_of_a_whole_model(method: str, pattern: str | None, tokens: Tensor) -> None:
    dense = pico_model()
    expected, lost = dense(tokens).logits, []
    for how in ("none", "layer"):
        model = pico_model()
        metrics = sqft.sparsify(model, sqft.SparsifyConfig(method=method, pattern=pattern, repair=how), tokens)
        assert metrics["sparsity"] == 0.5
        lost.append(float((model(tokens).logits - expected).detach().norm()))
    assert lost[1] < 0.8 * lost[0]


@pytest.mark.parametrize("sparse", [False, True])
def test_before_quantizing(sparse: bool, tokens: Tensor) -> None:
    """The first layers see what the un-quantized model's see: nothing is to be made good. Later ones are repaired, on
    their masks."""
    expected, found = {}, {}
    for how in ("none", "layer"):
        model = pico_model()
        if sparse:
            sqft.sparsify(model, sqft.SparsifyConfig(), tokens)
        expected = model(tokens).logits.detach()
        metrics = sqft.quantize(model, sqft.QuantizeConfig(group_size=32, repair=how), tokens)
        lost = float((model(tokens).logits - expected).detach().norm())
        found[how] = {w.name: w.module.qweight for w in describe(model).weights()}, lost, metrics
    (before, lost_before, _), (after, lost_after, metrics) = found["none"], found["layer"]
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(before[first], after[first])
    assert not torch.equal(before["model.layers.1.mlp.down_proj"], after["model.layers.1.mlp.down_proj"])
    assert lost_after < lost_before and metrics["zeros_kept"] == 1.0 and bool(metrics["pruned"]) is sparse


def test_does_not_go_with_gradients(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    by_gradient = sparsifier(needs=Gradient)(lambda w, g, pattern: Pruned(pattern.kept(g)))
    monkeypatch.setattr("sqft.sparsity.wanda.wanda", by_gradient)
    with pytest.raises(sqft.UsageError, match="repair layer does not go with the method wanda"):
        sqft.sparsify(pico_model(), sqft.SparsifyConfig(repair="layer"), tokens)
