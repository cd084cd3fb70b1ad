"""Calibration tokens from texts, data sets and tasks, each with its share of the blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.calibration.data import read_texts, token_blocks
from sqft.config import Compressing
from sqft.keys import sources
from sqft.models.types import Tokenizer
from sqft.tasks.lookup import get_task, is_task


def calibration_tokens(tokenizer: Tokenizer, config: Compressing) -> Tensor:
    """int64 [samples, length]: seeded blocks of ``config.calibration``'s sources, in their order. A task's text are its
    training examples, prompt and completion as training sees them. Raises UsageError and SqftError as reading does."""
    parts = sources(config.calibration)
    total, done, taken, blocks = sum(weight for _, weight in parts), 0.0, 0, []
    for name, weight in parts:
        done += weight
        count = round(config.samples * done / total) - taken
        if count:
            blocks.append(
                token_blocks(tokenizer, texts_of(name, config.data_dir), count, config.length, config.seed, name)
            )
        taken += count
    return torch.cat(blocks)


def texts_of(name: str, data_dir: str | None) -> list[str]:
    """The texts of one source."""
    if not is_task(name):
        return read_texts(name)
    return [example.prompt + example.completion for example in get_task(name, data_dir).examples("train")]
