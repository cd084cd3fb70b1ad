"""SparseGPT against a naive float64 version of the paper's Algorithm 1, with explicit inverses instead of a factor."""

from __future__ import annotations

import pytest
import torch
from pico import pico_model
from test_gptq import loss, problem
from torch import Tensor

import sqft
from sqft.sparsity.magnitude import magnitude
from sqft.sparsity.masks import mask_of
from sqft.sparsity.pattern import Pattern
from sqft.sparsity.sparsegpt import DAMPING, sparsegpt
from sqft.sparsity.wanda import wanda

PATTERNS = [Pattern(0.5), Pattern(0.7), Pattern.parse("2:4"), Pattern.parse("32:64"), Pattern.parse("3:12")]


def naive(w: Tensor, h: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Column by column; a block's mask is chosen when its first column is reached, by w_c^2 / [H_c..^-1]_cc."""
    w, h = w.double().clone(), h.double()
    rows, columns = w.shape
    h = h + DAMPING * h.diagonal().mean() * torch.eye(columns)
    inverses = [torch.linalg.inv(h[c:, c:]) for c in range(columns)]
    earlier = w == 0
    mask = torch.ones(rows, columns, dtype=torch.bool)
    size = pattern.group or 128
    for c in range(columns):
        if c % size == 0:
            block = list(range(c, min(c + size, columns)))
            saliency = torch.stack([w[:, j].square() / inverses[j][0, 0] for j in block], 1)
            saliency[earlier[:, block]] = -1
            for group in [saliency] if pattern.ratio else saliency:
                count = int(group.numel() * pattern.ratio) if pattern.ratio else pattern.group - pattern.keep
                group.view(-1)[group.flatten().argsort()[:count]] = -2
            mask[:, block] = saliency >= 0
        error = torch.where(mask[:, c], 0, w[:, c]) / inverses[c][0, 0]
        w[:, c:] -= torch.outer(error, inverses[c][0])
        w[:, c] *= mask[:, c]
    return mask, w


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["dense", "sparse before"])
def test_equals_the_naive_version(pattern: Pattern, again: bool) -> None:
    for seed in range(2):
        w, h, earlier = problem(seed, inputs=192)  # more than one block of columns
        w = w * earlier if again else w
        mask, expected = naive(w, h, pattern)
        pruned = sparsegpt(w.double(), h, pattern)
        assert torch.equal(pruned.mask_OI, mask)
        torch.testing.assert_close(pruned.w_OI, expected)
        assert not pruned.w_OI[~mask].any() and pruned.w_OI[mask].all()
        assert not (mask & ~earlier).any() or not again
        single = sparsegpt(w, h, pattern)  # in float32 a score may fall to the other side of another
        assert loss(w, single.w_OI, h) == pytest.approx(loss(w, expected, h), rel=0.02)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_loses_less_than_magnitude_and_wanda(pattern: Pattern) -> None:
    for seed in range(4):
        w, h, _ = problem(seed, rows=32, inputs=192)
        ours = sparsegpt(w, h, pattern)
        others = magnitude(w, pattern).mask_OI, wanda(w, h.double().diagonal().sqrt(), pattern).mask_OI
        assert abs(int(ours.mask_OI.sum()) - int(others[0].sum())) <= 32  # a ratio is of blocks here, of rows there
        assert all(loss(w, ours.w_OI, h) < 0.8 * loss(w, w * mask, h) for mask in others)


def test_inputs_that_were_never_active_are_pruned_first() -> None:
    w, h, _ = problem(2)
    dead = torch.arange(0, 64, 4)
    h[dead], h[:, dead] = 0, 0
    assert not sparsegpt(w, h, Pattern.parse("3:4")).mask_OI[:, dead].any()
    assert not sparsegpt(w, h, Pattern(0.5)).mask_OI[:, dead].any()


def test_half_precision_and_transposed_weights() -> None:
    """Computed in float32, given back in the weight's dtype; the weight itself is not written to."""
    w, h, _ = problem(3)
    for given in (w.bfloat16(), w.mT.contiguous().mT):
        before = given.clone()
        pruned = sparsegpt(given, h, Pattern(0.5))
        assert pruned.w_OI.dtype == given.dtype and torch.equal(given, before)
        assert torch.equal(pruned.w_OI, sparsegpt(given.float(), h, Pattern(0.5)).w_OI.to(given.dtype))


@pytest.mark.parametrize("pattern", [None, "2:4", "16:32"])
def test_of_a_whole_model(pattern: str | None, tokens: Tensor) -> None:
    dense, model = pico_model(), pico_model()
    metrics = sqft.sparsify(model, sqft.SparsifyConfig(method="sparsegpt", pattern=pattern), tokens)
    assert metrics["sparsity"] == 0.5
    for name, before in dense.named_parameters():
        weight = model.get_parameter(name)
        mask = (
            mask_of(model.get_submodule(name.removesuffix(".weight")))
            if ".layers." in name and before.dim() > 1
            else None
        )
        if mask is None:
            assert torch.equal(weight, before), name
        else:
            assert torch.equal(weight != 0, mask) and not torch.equal(weight[mask], before[mask]), name
    again = sqft.sparsify(model, sqft.SparsifyConfig(method="sparsegpt", sparsity=0.25), tokens)
    assert again["sparsity"] == 0.5
