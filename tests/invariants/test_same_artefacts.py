"""The move to the second plan changed no result: every stage's artefacts, as the code before it wrote them.

On the processor that they were written on, bit for bit; on others floats may differ in their last bits.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.artefacts import FAMILIES, fingerprints, processor
from transformers.trainer_pt_utils import get_length_grouped_indices

from sqft.training.trainer import Order

BEFORE = json.loads(gzip.decompress((Path(__file__).parents[1] / "fixtures" / "before_the_move.json.gz").read_bytes()))
SAME_BITS = processor() == BEFORE["processor"]


@pytest.fixture
def order_of_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in the order that Trainer drew from torch's global generator; now it is a function of seed and epoch."""

    def rows(self: Any) -> Iterator[int]:
        yield from get_length_grouped_indices(self._lengths, self._config.batch_size, generator=None)

    monkeypatch.setattr(Order, "__iter__", rows)


@pytest.fixture
def loss_of_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own, of all its logits: sums were rounded in another order."""
    monkeypatch.setattr("sqft.training.trainer.labels_loss", lambda model: None)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_gives_what_it_gave_before_the_move(family: str, order_of_then: None, loss_of_then: None) -> None:
    before, after = BEFORE["families"][family], fingerprints(family)
    assert after.keys() == before.keys()
    for folder, expected in before.items():
        found = after[folder]
        assert found["tensors"].keys() == expected["tensors"].keys(), folder
        wrong = [name for name, value in expected["tensors"].items() if not same(value, found["tensors"][name])]
        assert not wrong, f"{folder}: {len(wrong)} tensors differ, e.g. {wrong[0]}"
        assert near(expected["numbers"], {key: found["numbers"].get(key) for key in expected["numbers"]}), folder


def same(expected: list[Any], found: list[Any]) -> bool:
    """Of two tensors' fingerprints."""
    if SAME_BITS:
        return expected[:3] == found[:3]
    kind, shape = found[:2]
    small = 1e-3 if kind.startswith(("float", "bfloat")) else 2e-2  # of integers: one that rounded the other way
    scale = max(1.0, abs(expected[4]))
    return [kind, shape] == expected[:2] and all(
        abs(a - b) <= small * scale for a, b in zip(expected[3:], found[3:], strict=True)
    )


def near(expected: Any, found: Any) -> bool:
    if isinstance(expected, dict):
        return expected.keys() == found.keys() and all(near(value, found[key]) for key, value in expected.items())
    if isinstance(expected, float) and not SAME_BITS:
        return math.isclose(expected, found, rel_tol=2e-2, abs_tol=1e-4)
    return expected == found
