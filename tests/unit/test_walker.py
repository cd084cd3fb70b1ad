"""The one pass of true-sequential quantization, on blocks that do not call their layers in the simplest way."""

from __future__ import annotations

import copy
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from pico import pico_model
from torch import Tensor, nn

import sqft
from sqft.calibration.spill import Spilled
from sqft.calibration.statistics import ColumnNorms
from sqft.calibration.walker import Calls, _in_groups, capture, walk
from sqft.errors import SqftError
from sqft.models.discover import Architecture, Block, describe
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
    def __init__(self, name: str) -> None:
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
    calls = Calls(list(batches), [[((), {})] * 3], returns_tuple=False)
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
def test_two_streams_that_take_other_ways_are_refused() -> None:
    """An input would be paired with another layer's."""
    module = Routed(False)
    weights = {name: Weight(name, getattr(module, name), module) for name in ("first", "expert", "last")}
    ours, dense = (Calls([torch.randn(2, 3, 4) + by], [[((), {})]], returns_tuple=False) for by in (5.0, -5.0))
    seen = lambda name: SimpleNamespace(update=lambda x, dense_x: None)  # noqa: E731
    with pytest.raises(sqft.SqftError, match="is reached by other tokens"):
        _in_groups(Block("", module, weights), 0, ours, torch.device("cpu"), seen, lambda *_: None, dense)
    assert not any(weight.module._forward_pre_hooks for weight in weights.values())


@torch.no_grad()
def test_an_error_in_the_middle_leaves_no_hooks() -> None:
    module = Routed(False)
    weights = {name: Weight(name, getattr(module, name), module) for name in ("first", "expert", "last")}
    calls = Calls([torch.ones(1, 2, 4)], [[((), {})]], returns_tuple=False)

    def change(block: Block, statistics: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _in_groups(Block("", module, weights), 0, calls, torch.device("cpu"), Inputs, change)
    assert not any(weight.module._forward_pre_hooks for weight in weights.values())


class Gated(nn.Module):
    """A block that is called with a tensor of its batch (as Gemma 4's with per-layer embeddings), and with a dict that
    blocks share and write to."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.linear, self.first = nn.Linear(4, 4, bias=False), first

    def forward(
        self, x: Tensor, gate: Tensor, mask: Tensor, seen: dict | None = None, use_cache: bool = False
    ) -> Tensor:
        if self.first:
            seen["x"] = x
        return self.linear(x * gate + mask) + seen["x"]


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(Gated(i == 0) for i in range(3))

    def forward(self, tokens: Tensor, use_cache: bool = False) -> Tensor:
        x, seen = self.embed(tokens), {}
        gate, mask = x.exp(), torch.ones(1, tokens.shape[1], 1)  # the first is of this batch, the second of any
        for layer in self.layers:
            x = layer(x, gate, mask=mask, seen=seen, use_cache=use_cache)
        return x


def test_each_batch_is_replayed_with_its_own_arguments() -> None:
    torch.manual_seed(0)
    model = Backbone()
    weights = [Weight(f"layers.{i}.linear", layer.linear, layer) for i, layer in enumerate(model.layers)]
    blocks = tuple(Block(f"layers.{i}", layer, {weights[i].name: weights[i]}) for i, layer in enumerate(model.layers))
    architecture = Architecture(describe(pico_model()).family, model, blocks)
    tokens = torch.randint(10, (6, 5))
    expected = copy.deepcopy(model)
    inputs: dict[int, Tensor] = {}
    for i, layer in enumerate(expected.layers):
        layer.linear.register_forward_pre_hook(lambda module, args, i=i: inputs.update({i: args[0].detach().double()}))
    norms = {}

    def change(block: Block, statistics: dict) -> None:
        norms.update({name: statistic.value() for name, statistic in statistics.items()})

    for index, _ in enumerate(walk(architecture, tokens, 2, ColumnNorms, change, "test", torch.device("cpu"))):
        expected(tokens)
        torch.testing.assert_close(norms[weights[index].name], inputs[index].flatten(0, 1).square().sum(0).sqrt())
    calls = capture(architecture, tokens, 2).arguments[1]
    assert len({id(keywords["mask"]) for _, keywords in calls}) == 1  # what is equal is held once
    assert len({id(arguments[0]) for arguments, _ in calls}) == 3


@pytest.mark.parametrize("config", [sqft.SparsifyConfig(), sqft.SparsifyConfig(method="magnitude"),
                                    sqft.SparsifyConfig(method="sparsegpt"), sqft.QuantizeConfig(group_size=32)])  # fmt: skip
def test_a_model_dispatched_by_accelerate_walks_too(config, tokens: Tensor) -> None:
    """Its weights are elsewhere (here off-loaded) and come for a forward only."""
    plain, dispatched = pico_model(), cpu_offload(pico_model(), torch.device("cpu"))
    for model in (plain, dispatched):
        run = sqft.sparsify if isinstance(config, sqft.SparsifyConfig) else sqft.quantize
        run(model, config, tokens)
    for ours, theirs in zip(describe(plain).weights(), describe(dispatched).weights(), strict=True):
        assert torch.equal(ours.read(), theirs.read().cpu()), ours.name
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, dispatched(tokens).logits)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_blocks_are_computed_on_the_picked_device_and_come_home(method: str, tokens: Tensor, monkeypatch) -> None:
    """An accelerator's part is played by the CPU's other name."""
    accelerator, home, places, original = torch.device("cpu", 0), torch.device("cpu"), [], nn.Module.to

    def to(module: nn.Module, device: torch.device) -> nn.Module:
        places.append(device)
        return original(module, device)

    monkeypatch.setattr("sqft.compressing.passes.pick_device", lambda name: accelerator)
    monkeypatch.setattr(nn.Module, "to", to)
    sqft.sparsify(pico_model(), sqft.SparsifyConfig(method=method), tokens)
    assert accelerator != home and places == [accelerator, home] * 2


@pytest.mark.parametrize("options", [{}, {"repair": "layer"}, {"repair": "block", "repair_epochs": 1}], ids=str)
def test_activations_in_files_change_nothing(options: dict, tokens: Tensor, tmp_path: Path) -> None:
    """The same weights, and no file is left; a folder that is not there, or a full disk, is one line."""
    models = [pico_model("llama", dtype=torch.bfloat16) for _ in range(2)]
    for model, spill in zip(models, (None, str(tmp_path)), strict=True):
        sqft.sparsify(model, sqft.SparsifyConfig(spill=spill, **options), tokens)
    assert all(torch.equal(one, models[1].state_dict()[name]) for name, one in models[0].state_dict().items())
    assert not list(tmp_path.iterdir())
    with pytest.raises(sqft.UsageError, match="there is no folder"):
        sqft.sparsify(models[0], sqft.SparsifyConfig(spill=str(tmp_path / "no")), tokens)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    spilled, (soft, hard) = Spilled(str(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(SqftError, match=r"cannot spill 1 MB of activations to .* \(.*File too large"):
            spilled.append(torch.ones(1 << 18))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not spilled and not list(tmp_path.iterdir())
