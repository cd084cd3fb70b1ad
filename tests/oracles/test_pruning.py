"""Magnitude and Wanda against naive float64 versions written straight from the papers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import FAMILIES, pico_model
from torch import Tensor

import sqft
from sqft.models.discover import describe
from sqft.sparsity.magnitude import magnitude
from sqft.sparsity.masks import mask_of
from sqft.sparsity.wanda import wanda


def naive(score: Tensor, ratio: float, pattern: tuple[int, int] | None) -> Tensor:
    """Row by row, group by group, by a full stable sort."""
    mask = torch.ones(score.shape, dtype=torch.bool)
    for row in range(score.shape[0]):
        group = pattern[1] if pattern else score.shape[1]
        for start in range(0, score.shape[1], group):
            part = score[row, start : start + group].tolist()
            pruned = group - pattern[0] if pattern else int(group * ratio)
            for column in sorted(range(group), key=lambda c: part[c])[:pruned]:
                mask[row, start + column] = False
    return mask


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 6), st.floats(0.05, 0.95), st.sampled_from([None, (2, 4), (4, 8), (1, 4)]),
       st.integers(0, 10**6))  # fmt: skip
def test_equal_the_naive_versions(rows: int, eighths: int, ratio: float, pattern, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, 8 * eighths, generator=g)
    norm = torch.rand(8 * eighths, generator=g, dtype=torch.float64) + 0.1
    assert torch.equal(magnitude(w, None, ratio, pattern), naive(w.double().abs(), ratio, pattern))
    assert torch.equal(wanda(w, norm, ratio, pattern), naive(w.double().abs() * norm, ratio, pattern))


def test_ties_prune_exactly_the_share() -> None:
    mask = magnitude(torch.ones(5, 16), None, 0.5, None)
    assert (mask.sum(1) == 8).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_of_a_whole_model(family: str, tokens: Tensor) -> None:
    """The walker against hooks on whole forward passes: block after block, each seeing the pruned ones before it."""
    model, reference = pico_model(family), pico_model(family)
    sqft.sparsify(model, sqft.SparsifyConfig(batch_size=4), tokens)  # 6 blocks: batches of 3
    for block in describe(reference).blocks:
        squares = {name: torch.zeros(weight.shape[1], dtype=torch.float64) for name, weight in block.weights.items()}

        def observe(name: str, squares=squares):
            def hook(module, arguments):
                squares[name] += arguments[0].detach().double().flatten(0, -2).square().sum(0)

            return hook

        handles = [weight.module.register_forward_pre_hook(observe(name)) for name, weight in block.weights.items()]
        with torch.no_grad():
            for batch in tokens.split(3):
                reference(input_ids=batch, use_cache=False)
        for handle in handles:
            handle.remove()
        for name, weight in block.weights.items():
            linear = weight.module
            mask = naive(linear.weight.detach().double().abs() * squares[name].sqrt(), 0.5, None)
            ours = model.get_submodule(name)
            assert torch.equal(mask_of(ours), mask), name
            linear.weight.data *= mask
            assert torch.equal(ours.weight, linear.weight)
