"""The one pass of true-sequential quantization, on blocks that do not call their layers in the simplest way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sqft.calibration.walker import Calls, _in_groups
from sqft.models.discover import Block
from sqft.models.weights import Weight


class Routed(nn.Module):
    """x -> first; then expert for batches of positive mean, alone and, when ``twice``, once more; then last."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.first, self.expert, self.last = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.twice = twice

    def forward(self, x: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        h = self.first(x)
        if x.mean() > 0:
            h = self.expert(h)
            if self.twice:
                h = self.expert(h)
        return self.last(h)


class Inputs:
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def update(self, x: torch.Tensor) -> None:
        self.seen.append(x.clone())


@torch.no_grad()
@pytest.mark.parametrize("twice", [False, True])
def test_groups_see_what_the_changed_layers_before_them_give(twice: bool) -> None:
    torch.manual_seed(0)
    module = Routed(twice)
    weights = {name: Weight(name, getattr(module, name), module) for name in ("first", "expert", "last")}
    batches = [torch.randn(2, 3, 4) + shift for shift in (5.0, -5.0, 5.0)]
    calls = Calls(list(batches), [((), {})], returns_tuple=False)
    order, inputs = [], {}

    def change(block: Block, statistics: dict) -> None:
        ((name, statistic),) = statistics.items()
        order.append(name)
        inputs[name] = statistic.seen
        weights[name].write(weights[name].read() * 2)

    _in_groups(Block("", module, weights), 0, calls, torch.device("cpu"), Inputs, change)
    assert order == ["first", "expert", "last"]
    assert all(torch.equal(x, batch) for x, batch in zip(inputs["first"], batches, strict=True))
    expected = [module.first(batches[i]) for i in (0, 2)]  # of the changed layer; the middle batch skips the expert
    torch.testing.assert_close(inputs["expert"], expected)
    assert len(inputs["last"]) == 3
    for out, batch in zip(calls.hidden, batches, strict=True):
        torch.testing.assert_close(out, module(batch))
    assert not module.first._forward_pre_hooks and not module.expert._forward_pre_hooks


@torch.no_grad()
def test_an_error_in_the_middle_leaves_no_hooks() -> None:
    module = Routed(False)
    weights = {name: Weight(name, getattr(module, name), module) for name in ("first", "expert", "last")}
    calls = Calls([torch.ones(1, 2, 4)], [((), {})], returns_tuple=False)

    def change(block: Block, statistics: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _in_groups(Block("", module, weights), 0, calls, torch.device("cpu"), Inputs, change)
    assert not any(weight.module._forward_pre_hooks for weight in weights.values())
