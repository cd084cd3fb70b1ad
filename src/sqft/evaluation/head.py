"""The output layer of a model that is evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def rows_together(model: Any) -> Iterator[None]:
    """Gives the output layer its rows one after the other. Of rows that lie apart, as the last of each prompt do, torch
    copies a frozen weight for each (``should_fold`` of its matmul): 64 times a head of 262,144 tokens, say."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, given: (given[0].contiguous(), *given[1:]))
    try:
        yield
    finally:
        handle.remove()
