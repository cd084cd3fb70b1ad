"""Confidence intervals, stated with every score."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054


def wilson(correct: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 %): right also near 0 and 1 and for few problems."""
    if total == 0:
        return 0.0, 1.0
    p, z2 = correct / total, z * z
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def normal(values: list[float], z: float = Z95) -> tuple[float, float]:
    """Normal interval (95 %) of the mean of independent values; of a single one, which tells none, the value."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, mean
    half = z * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean - half, mean + half


def paired(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[float, float]:
    """Normal interval (95 %) of the difference of two accuracies on the same problems, problem by problem."""
    return normal([float(a) - float(b) for a, b in zip(ours, theirs, strict=True)])
