"""ALPS against a naive float64 version of the paper's iteration, with explicit inverses; and what it is worth."""

from __future__ import annotations

import pytest
import torch
from pico import pico_model
from test_gptq import loss, problem
from torch import Tensor

import sqft
from sqft.sparsity.alps import DAMPING, EVERY, GROWTH, MOST, PENALTY, alps
from sqft.sparsity.pattern import Pattern
from sqft.sparsity.repair import repair
from sqft.sparsity.wanda import wanda

PATTERNS = [Pattern(0.5), Pattern(0.7), Pattern.parse("2:4"), Pattern.parse("16:32")]


def naive(w: Tensor, h: Tensor, pattern: Pattern) -> Tensor:
    """The mask, by the paper's updates of the scaled problem, a penalty and an inverse an iteration."""
    e = h.diagonal().sqrt()
    w0, h = w * e, h / torch.outer(e, e) + DAMPING * torch.eye(len(h), dtype=h.dtype)
    d, v, r, supports = w0, torch.zeros_like(w0), PENALTY, [pattern.kept(w0.abs())]
    for iteration in range(MOST):
        step = (w0 @ h - v + r * d) @ torch.linalg.inv(h + r * torch.eye(len(h), dtype=h.dtype))
        kept = pattern.kept((step + v / r).abs())
        d = torch.where(kept, step + v / r, 0)
        v = v + r * (step - d)
        if iteration % EVERY == EVERY - 1:
            changed = int((kept != supports[-1]).sum()) / int(kept.sum())
            supports.append(kept)
            if changed == 0:
                break
            r *= GROWTH[0][1] if changed >= 0.1 else GROWTH[1][1] if changed >= 0.005 else GROWTH[2][1]
    return supports[-1]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_the_naive_version(pattern: Pattern) -> None:
    for seed in range(2):
        w, h, _ = problem(seed, inputs=96)
        pruned = alps(w.double(), h.double(), pattern)
        assert torch.equal(pruned.mask_OI, naive(w.double(), h.double(), pattern))
        assert torch.equal(pruned.mask_OI.sum(1), wanda(w, h.double().diagonal().sqrt(), pattern).mask_OI.sum(1))
        assert not pruned.w_OI[~pruned.mask_OI].any()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_loses_less_than_wanda_repaired_alike(pattern: Pattern) -> None:
    for seed in range(3):
        w, h, _ = problem(seed, rows=32, inputs=192)
        mask = wanda(w, h.double().diagonal().sqrt(), pattern).mask_OI
        other = repair(w * mask, w, mask, h, h, damping=DAMPING, lean=0)
        assert loss(w, alps(w, h, pattern).w_OI, h) < 0.97 * loss(w, other, h)


def test_dead_inputs_and_earlier_zeros_and_half_precision() -> None:
    w, h, earlier = problem(2)
    dead = torch.arange(0, 64, 4)
    h[dead], h[:, dead] = 0, 0
    assert not alps(w, h, Pattern.parse("3:4")).mask_OI[:, dead].any()
    again = alps(w * earlier, h, Pattern(0.5))
    assert not again.mask_OI[~earlier].any() and torch.isfinite(again.w_OI).all()
    half = alps(w.bfloat16(), h, Pattern(0.5))
    assert half.w_OI.dtype == torch.bfloat16 and torch.equal(
        half.w_OI, alps(w.bfloat16().float(), h, Pattern(0.5)).w_OI.bfloat16()
    )


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_of_a_whole_model(pattern: str | None, tokens: Tensor) -> None:
    model = pico_model()
    assert sqft.sparsify(model, sqft.SparsifyConfig(method="alps", pattern=pattern), tokens)["sparsity"] == 0.5
