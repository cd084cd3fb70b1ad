"""Mean loss of a task's completions: one forward a batch, no generation, and finer than accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sqft.errors import SqftError
from sqft.models.placement import input_device
from sqft.tasks.base import Example
from sqft.training.data import IGNORED, collate, is_learnt, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def completion_loss(model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example],
                    batch_size: int) -> float:  # fmt: skip
    """Cross-entropy a token of all completions together, in nats. Nothing is cut: raises SqftError for an example that
    is longer than the model takes."""
    rows = sorted(filter(is_learnt, (tokenize(e, tokenizer) for e in examples)), key=lambda row: len(row["input_ids"]))
    if not rows:
        raise SqftError("no completion to score: check the task's templates")
    longest, limit = (
        len(rows[-1]["input_ids"]),
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )
    if limit is not None and longest > limit:
        raise SqftError(f"an example has {longest} tokens, but the model takes {limit}: choose shorter ones (with a "
                        "limit, or another task)")  # fmt: skip
    device = input_device(model)
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = {key: values.to(device) for key, values in collate(rows[start : start + batch_size], 0).items()}
        target = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits
        kept = target != IGNORED
        total += float(F.cross_entropy(logits[:, :-1][kept].float(), target[kept], reduction="sum"))
        count += int(kept.sum())
    return total / count
