"""Magnitude pruning and the choice shared by all criteria: which scores are smallest, per row or per N:M group.

Shape letters: O output features, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.errors import SqftError


def magnitude(w_OI: Tensor, norm_I: Tensor | None, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """Mask bool [O, I] that keeps the weights of largest magnitude. ``norm_I`` is not used."""
    return keep_largest(w_OI.detach().abs(), sparsity, pattern)


def keep_largest(score_OI: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """bool [O, I], False at the smallest scores: ``int(I * sparsity)`` of each row, or M - N of each N:M group.

    The comparison group is a row because Wanda's is (arXiv 2306.11695, section 3). Raises SqftError if M does not
    divide I.
    """
    rows, columns = score_OI.shape
    if pattern is not None:
        keep, group = pattern
        if columns % group:
            raise SqftError(
                f"pattern {keep}:{group} does not divide the {columns} inputs of a [{rows}, {columns}] weight"
            )
        score, pruned = score_OI.reshape(-1, group), group - keep
    else:
        score, pruned = score_OI, int(columns * sparsity)
    mask = torch.ones_like(score, dtype=torch.bool)
    mask.scatter_(1, score.topk(pruned, dim=1, largest=False, sorted=False).indices, False)
    return mask.view(rows, columns)
