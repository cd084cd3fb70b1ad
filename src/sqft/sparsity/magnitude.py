"""Magnitude pruning. Shape letters: O output features, I input features."""

from __future__ import annotations

from torch import Tensor

from sqft.sparsity.method import Pruned, sparsifier
from sqft.sparsity.pattern import Pattern


@sparsifier(paper="arXiv 1506.02626")
def magnitude(w_OI: Tensor, pattern: Pattern) -> Pruned:
    """Keeps the weights of largest magnitude of each output row (or N:M group)."""
    return Pruned(pattern.kept(w_OI.detach().abs()))
