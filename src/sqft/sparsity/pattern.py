"""``Pattern``: how much of a weight is kept, and the choice that follows from scores.

Shape letters: O output features, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sqft.errors import UsageError
from sqft.options import parse_pattern


@dataclass(frozen=True)
class Pattern:
    """A share of each row to prune (``Pattern(0.5)``), or N:M (``Pattern.parse('2:4')``): ``keep`` N of every ``group``
    of M neighbours along the input, for any M that divides the inputs."""

    ratio: float | None = None
    keep: int = 0
    group: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Of 'N:M'. Raises UsageError for anything else."""
        return cls(None, *parse_pattern(text))

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" if self.ratio is None else f"{self.ratio:g}"

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raises UsageError if a weight (O, I) cannot be pruned so, or would not be at all."""
        if self.ratio is None:
            if shape[1] % self.group:
                raise UsageError(f"pattern {self} does not divide the inputs of {name} {list(shape)}: exclude the "
                                 "module")  # fmt: skip
        elif int(shape[1] * self.ratio) == 0:
            raise UsageError(f"sparsity {self} prunes nothing of {name} {list(shape)}: a row has too few inputs")

    def kept(self, score_OI: Tensor) -> Tensor:
        """bool [O, I], False at the smallest scores: ``int(I * ratio)`` of each row, as in Wanda (arXiv 2306.11695,
        section 3), or M - N of each N:M group. Raises UsageError if M does not divide I."""
        rows, columns = score_OI.shape
        if self.ratio is not None:
            score, pruned = score_OI, int(columns * self.ratio)
        else:
            self.check("a weight", (rows, columns))
            score, pruned = score_OI.reshape(-1, self.group), self.group - self.keep
        mask = torch.ones_like(score, dtype=torch.bool)
        mask.scatter_(1, score.topk(pruned, dim=1, largest=False, sorted=False).indices, False)
        return mask.view(rows, columns)
