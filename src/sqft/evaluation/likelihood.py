"""Mean loss of a task's completions: one forward a batch, no generation, and finer than accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sqft.config import TrainConfig
from sqft.tasks.base import Example
from sqft.training.data import IGNORED, tokenize_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def completion_loss(model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example],
                    batch_size: int) -> float:  # fmt: skip
    """Cross-entropy a token of all completions together, in nats."""
    rows = sorted(tokenize_all(examples, tokenizer, TrainConfig()), key=lambda row: len(row["input_ids"]))
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        length = max(len(row["input_ids"]) for row in batch)
        padded = {key: torch.tensor([row[key] + [fill] * (length - len(row[key])) for row in batch], device=device)
                  for key, fill in (("input_ids", 0), ("labels", IGNORED))}  # fmt: skip
        attention = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"]))
                                  for row in batch], device=device)  # fmt: skip
        logits = model(input_ids=padded["input_ids"], attention_mask=attention, use_cache=False).logits
        target = padded["labels"][:, 1:]
        kept = target != IGNORED
        total += float(F.cross_entropy(logits[:, :-1][kept].float(), target[kept], reduction="sum"))
        count += int(kept.sum())
    return total / count
