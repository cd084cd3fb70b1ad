"""Reconstruction of blocks: against its exact solution where there is one; masks, held-out text, and going on."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import FAMILIES, pico_model
from safetensors.torch import load_file
from torch import Tensor

import sqft
from sqft.compressing.rebuild import BlockRepair
from sqft.models.discover import Block, describe
from sqft.sparsity.masks import mask_of
from sqft.sparsity.reconstruct import held_out, reconstruct, relative_error

CONFIG = sqft.SparsifyConfig(repair="block", batch_size=1, repair_epochs=4, repair_rate=2e-3)


def test_goes_to_the_exact_solution() -> None:
    """One linear layer with targets of unit norm: least squares on each row's support."""
    torch.manual_seed(0)
    inputs = [torch.randn(40, 12, dtype=torch.float64) for _ in range(8)]
    w_OI, mask_OI = torch.randn(5, 12, dtype=torch.float64), torch.rand(5, 12) < 0.6
    targets = [torch.nn.functional.normalize(x @ w_OI.mT, dim=-1) for x in inputs]
    trained = torch.cat(inputs[:-1]), torch.cat(targets[:-1])
    expected = torch.zeros_like(w_OI)
    for row, mask_I, y in zip(expected, mask_OI, trained[1].unbind(1), strict=True):
        row[mask_I] = torch.linalg.lstsq(trained[0][:, mask_I], y[:, None]).solution[:, 0]
    forward = lambda tensors, i: inputs[i] @ tensors["w"].mT  # noqa: E731
    found = reconstruct(forward, {"w": w_OI * mask_OI}, {"w": mask_OI}, targets, 300, 0.02, 0)
    error = [
        float(relative_error(trained[0] @ w.mT, trained[1])) for w in (w_OI * mask_OI, found.tensors["w"], expected)
    ]
    assert error[2] <= error[1] < 1.02 * error[2] < 0.3 * error[0]
    held = [float(relative_error(inputs[-1] @ w.mT, targets[-1])) for w in (w_OI * mask_OI, found.tensors["w"])]
    assert (found.before, found.after) == pytest.approx(held)
    assert not found.tensors["w"][~mask_OI].any() and found.tensors["w"].dtype == torch.float64


def test_relative_error_is_of_each_token() -> None:
    target = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    y = target + torch.tensor([[[0.0, 5.0], [100.0, 0.0]]])
    assert relative_error(y, target) == pytest.approx((1 + 0.04) / 2)
    assert relative_error(y.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_the_held_out_error_decides() -> None:
    """Text that the held-out batch contradicts: what was given stays, and training ends early."""
    x = [torch.ones(3, 2)] * 8
    targets = [torch.ones(3, 1) * 2] * 7 + [torch.ones(3, 1)]
    start = {"w": torch.tensor([[1.0, 0.0]])}
    masks = {"w": torch.tensor([[True, False]])}
    found = reconstruct(lambda tensors, i: x[i] @ tensors["w"].mT, start, masks, targets, 50, 0.01, 0)
    assert torch.equal(found.tensors["w"], start["w"]) and found.before == found.after == 0 and found.epochs == 3
    assert held_out(32) == [7, 15, 23, 31] and held_out(2) == [1]


@pytest.fixture(scope="module")
def many() -> Tensor:
    return torch.randint(0, 256, (48, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_whole_model(family: str, tokens: Tensor, many: Tensor) -> None:
    """Nearer to the dense model than layer repair, in every family; masks are layer repair's where inputs are equal."""
    dense, lost = pico_model(family), []
    expected = dense(tokens).logits.detach()
    for how in ("layer", "block"):
        model = pico_model(family)
        config = sqft.SparsifyConfig(repair=how, batch_size=2, pattern="2:4", repair_epochs=4, repair_rate=1e-3)
        metrics = sqft.sparsify(model, config, many)
        assert metrics["sparsity"] == 0.5
        for weight in describe(model).weights():
            assert torch.equal(weight.read() != 0, weight.mask), weight.name
        lost.append(float((model(tokens).logits.detach() - expected).norm()))
    assert lost[1] < 0.97 * lost[0], lost
    assert metrics["error_after"] < metrics["error_before"] and len(metrics["blocks"]) == 2
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, dense.get_parameter(name))]
    assert any("norm" in name for name in changed) and not any("embed" in name or "lm_head" in name for name in changed)


def test_each_block_is_trained_towards_the_dense_model(tokens: Tensor) -> None:
    """The walk hands over the pruned stream's inputs and the dense stream's outputs; the next block sees the result."""
    from sqft.calibration.statistics import Paired
    from sqft.calibration.walker import walk

    model = pico_model()
    dense, errors = copy.deepcopy(model), {}

    class Halve:
        def known(self, block: Block) -> bool:
            return False

        def change(self, block: Block, forward: Any, targets: list[Tensor]) -> None:
            own = {name: p.detach().clone() for name, p in block.module.named_parameters()}
            halved = {name: p / 2 if "norm" in name else p for name, p in own.items()}
            errors[block.name] = [float((forward(own, i) - t).detach().norm()) for i, t in enumerate(targets)]
            with torch.no_grad():
                for name, p in block.module.named_parameters():
                    p.copy_(halved[name])

    def change(block: Block, statistics: Mapping[str, Any]) -> None:
        for name in statistics:
            block.weights[name].write(block.weights[name].read() * 0.9)

    seen: dict[str, list[Tensor]] = {"ours": [], "dense": []}
    inputs = copy.deepcopy(model)  # the changed model, block by block
    for block in walk(describe(model), tokens, 3, lambda name: Paired(None, name), change, "", torch.device("cpu"),
                      sequential=True, paired=True, rebuild=Halve()):  # fmt: skip
        del block
    for which, live in (("ours", model), ("dense", dense)):
        for layer in live.model.layers:
            layer.register_forward_pre_hook(lambda module, args, key=which: seen[key].append(args[0].detach()))
        live.model.norm.register_forward_pre_hook(lambda module, args, key=which: seen[key].append(args[0].detach()))
        with torch.no_grad():
            live(tokens)
    for index, layer in enumerate(inputs.model.layers):  # before it was halved
        layer.load_state_dict(model.model.layers[index].state_dict())
        with torch.no_grad():
            for name, p in layer.named_parameters():
                p.mul_(2 if "norm" in name else 1)
        calls = []
        hook = inputs.model.layers[index].register_forward_hook(
            lambda module, args, out, calls=calls: calls.append(out.detach())
        )
        reset = layer.register_forward_pre_hook(lambda module, args, i=index: (seen["ours"][i], *args[1:]))
        with torch.no_grad():
            inputs(tokens)
        hook.remove(), reset.remove()
        expected = [
            float((a - b).norm()) for a, b in zip(calls[0].split(3), seen["dense"][index + 1].split(3), strict=True)
        ]
        assert errors[f"model.layers.{index}"] == pytest.approx(expected, rel=1e-4)


def test_what_is_trained(many: Tensor) -> None:
    """Not what was excluded, nor its bias; and in the weights' own precision."""
    model = pico_model("opt", torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    config = sqft.SparsifyConfig(repair="block", batch_size=2, repair_rate=1e-3, repair_epochs=2, exclude=["fc1"])
    sqft.sparsify(model, config, many)
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    for name in (f"model.decoder.layers.{i}.{leaf}" for i in range(2) for leaf in ("fc1.weight", "fc1.bias")):
        assert name not in changed
    assert {"model.decoder.layers.0.fc2.weight", "model.decoder.layers.0.fc2.bias"} <= changed
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in model.parameters())
    for weight in describe(model).weights():
        assert weight.mask is None or not weight.read()[~weight.mask].any()


def test_products_in_half_precision(many: Tensor) -> None:
    """Of float32 weights: near what float32 products give, and as exact about zeros."""
    found = {}
    for precision in ("auto", "bfloat16"):
        model = pico_model()
        metrics = sqft.sparsify(model, replace(CONFIG, repair_rate=1e-3, repair_precision=precision), many)
        weights = list(describe(model).weights())
        assert all(w.dtype == torch.float32 and torch.equal(w.read() != 0, w.mask) for w in weights)
        found[precision] = metrics["error_after"], weights[-1].read()
    assert (
        found["bfloat16"][0] == pytest.approx(found["auto"][0], rel=0.02) and found["auto"][0] < metrics["error_before"]
    )
    assert not torch.equal(found["bfloat16"][1], found["auto"][1])


class Killed(Exception):
    pass


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_goes_on_where_it_was_with_the_same_bits(method: str, quantized: bool, dense: Path, tmp_path: Path,
                                                 tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    first = sqft.SparsifyConfig(method=method, repair="block", batch_size=2, repair_epochs=2)

    def run(out: Path) -> dict[str, Any]:
        if quantized:
            return sqft.quantize(dense, sqft.QuantizeConfig(group_size=32), tokens, first=first, out=out)
        return sqft.sparsify(dense, first, tokens, out=out)

    whole, change, trained = run(tmp_path / "whole"), BlockRepair.change, []

    def killing(self: BlockRepair, block: Block, *arguments: Any) -> None:
        trained.append(block.name)
        if trained == ["model.layers.0", "model.layers.1"]:
            raise Killed
        change(self, block, *arguments)

    monkeypatch.setattr(BlockRepair, "change", killing)
    with pytest.raises(Killed):
        run(tmp_path / "killed")
    (work,) = tmp_path.glob(".killed.compressing-*")
    assert [folder.name for folder in (work / "sparsify").iterdir()] == ["model.layers.0"]
    assert not (tmp_path / "killed").exists()
    again = run(tmp_path / "killed")
    assert trained[2:] == ["model.layers.1"]  # the first block was not trained again
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
    assert len(files) == 2
    for file in files:
        ours, theirs = load_file(tmp_path / "whole" / file), load_file(tmp_path / "killed" / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), file
    strip = lambda metrics: json.loads(json.dumps(metrics | {"seconds": 0, "repair_seconds": 0}), object_hook=_timeless)  # noqa: E731
    assert strip(whole) == strip(again)
    assert not list(tmp_path.glob(".*"))


def _timeless(value: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in value.items() if k != "seconds"}


def test_what_does_not_go(tokens: Tensor, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sqft.UsageError, match="repair block trains float weights"):
        sqft.QuantizeConfig(repair="block")
    with pytest.raises(sqft.UsageError, match="repair_epochs is 0"):
        sqft.SparsifyConfig(repair_epochs=0)
    with pytest.raises(sqft.SqftError, match="a single batch"):
        sqft.sparsify(pico_model(), CONFIG, tokens[:1])
    monkeypatch.setattr("sqft.compressing.rebuild.reconstruct", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        sqft.sparsify(dense, CONFIG, tokens, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_twice_on_what_is_sparse(tokens: Tensor) -> None:
    """The same model from the same tokens, and what was pruned before stays pruned."""
    models = [pico_model(), pico_model()]
    for model in models:
        sqft.sparsify(model, sqft.SparsifyConfig(sparsity=0.25), tokens)
        before = mask_of(model.model.layers[0].mlp.down_proj)
        sqft.sparsify(model, CONFIG, tokens)
        after = model.model.layers[0].mlp.down_proj
        assert not (mask_of(after) & ~before).any() and torch.equal(after.weight != 0, mask_of(after))
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))
