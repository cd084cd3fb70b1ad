"""What methods are told of a weight: statistics refuse what is not finite, gradients equal those of plain autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pico import pico_folder, pico_model
from torch import Tensor

import sqft
from sqft.calibration.statistics import ColumnNorms, Gradient, Hessian, gradients
from sqft.models.discover import describe
from sqft.registry import SPARSIFIERS
from sqft.sparsity.method import Pruned, sparsifier
from sqft.sparsity.pattern import Pattern


@pytest.mark.parametrize("kind", [ColumnNorms, Hessian])
@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_statistics_refuse_inputs_that_are_not_finite(kind: type, wrong: float) -> None:
    x = torch.randn(3, 5, 8)
    statistic = kind("the.layer")
    statistic.update(x)
    assert torch.isfinite(statistic.value()).all()
    x[1, 2, 3] = wrong
    statistic.update(x)
    with pytest.raises(sqft.SqftError, match=r"activations of the\.layer are not finite"):
        statistic.value()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_pruning_on_activations_that_are_not_finite_is_an_error(method: str, tokens: Tensor) -> None:
    model = pico_model()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.inf
    with pytest.raises(sqft.SqftError, match=r"model\.layers\.1\.self_attn\.q_proj are not finite.*--dtype float32"):
        sqft.sparsify(model, sqft.SparsifyConfig(method=method), tokens)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_summed_squares_of_each_blocks(frozen: bool, tokens: Tensor) -> None:
    model, reference = pico_model(), pico_model()
    model.requires_grad_(not frozen)
    weights = list(describe(model).weights())
    found = gradients(model, weights, tokens)
    expected = {weight.name: torch.zeros(weight.shape, dtype=torch.float64) for weight in weights}
    for block in tokens:
        reference.zero_grad()
        logits = reference(block[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, block[1:]).backward()
        for name, total in expected.items():
            total += reference.get_submodule(name).weight.grad.double().square()
    for name, total in expected.items():
        torch.testing.assert_close(found[name].value().double(), total, rtol=1e-3, atol=1e-12)
    assert all(p.requires_grad is not frozen and p.grad is None for p in model.parameters())


@sparsifier(needs=Gradient, paper="arXiv 1810.02340")
def snip(w_OI: Tensor, squares_OI: Tensor, pattern: Pattern) -> Pruned:
    """A third party's: |weight x gradient|, and the kept weights grow."""
    mask_OI = pattern.kept(w_OI.abs() * squares_OI.sqrt())
    return Pruned(mask_OI, 1.1 * w_OI)


def test_a_third_partys_sparsifier_that_needs_gradients_and_updates_weights(
    monkeypatch, tokens, tmp_path: Path
) -> None:
    monkeypatch.setitem(SPARSIFIERS._entries, "snip", f"{__name__}:snip")
    config = sqft.SparsifyConfig(method="snip", pattern="2:4", exclude=["k_proj"])
    model, dense = pico_model(), pico_model()
    found = gradients(dense, list(describe(dense).weights()), tokens)
    sqft.sparsify(model, config, tokens)
    sqft.sparsify(pico_folder(tmp_path / "dense"), config, tokens, out=tmp_path / "out")
    written, _ = sqft.load(tmp_path / "out")
    for weight in describe(dense).weights():
        mask = Pattern.parse("2:4").kept(weight.read().abs() * found[weight.name].value().sqrt())
        expected = weight.read() if "k_proj" in weight.name else torch.where(mask, 1.1 * weight.read(), 0)
        for other in (model, written):
            assert torch.equal(other.get_submodule(weight.name).weight, expected), weight.name


def test_a_plugin_that_is_not_decorated_is_an_error(monkeypatch) -> None:
    monkeypatch.setitem(SPARSIFIERS._entries, "snip", "sqft.quantization.rtn:rtn")
    with pytest.raises(sqft.SqftError, match="'snip' is not decorated.*@sparsifier"):
        sqft.sparsify(pico_model(), sqft.SparsifyConfig(method="snip"))


def test_patterns() -> None:
    assert Pattern.parse("32:64") == Pattern(None, 32, 64) and str(Pattern.parse("32:64")) == "32:64"
    for text in ("4:2", "2:", "0:4", "half"):
        with pytest.raises(sqft.UsageError, match=text):
            Pattern.parse(text)
    with pytest.raises(sqft.UsageError, match=r"pattern 3:5 does not divide the inputs of up_proj \[8, 16\]"):
        Pattern.parse("3:5").check("up_proj", (8, 16))
