"""Greedy solutions of a task's problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from sqft.evaluation.choices import start_token
from sqft.evaluation.head import rows_together
from sqft.models.discover import input_device
from sqft.models.types import Tokenizer
from sqft.tasks.base import Example, Task
from sqft.training.data import padded, padding


@torch.no_grad()
def generate(model: Any, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int,
             stop: Sequence[str]) -> list[str]:  # fmt: skip
    """Greedy continuations of a batch of prompts, each cut at the first of the ``stop`` strings."""
    rows: list[list[int]] = [ids or [start_token(tokenizer)] for ids in tokenizer(prompts)["input_ids"]]  # pyright: ignore
    fill, device = padding(tokenizer), input_device(model)
    tokens_NT, mask_NT = padded(rows, fill, left=True), padded([[1] * len(row) for row in rows], 0, left=True)
    with rows_together(model):
        out = model.generate(
            input_ids=tokens_NT.to(device), attention_mask=mask_NT.to(device), max_new_tokens=max_new_tokens,
            do_sample=False, pad_token_id=tokenizer.pad_token_id,
            stop_strings=list(stop) or None, tokenizer=tokenizer if stop else None,
        )  # fmt: skip
    texts = tokenizer.batch_decode(out[:, tokens_NT.shape[1] :], skip_special_tokens=True)
    return [cut(text, stop) for text in texts]


def cut(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first stop string."""
    ends = [position for position in (text.find(s) for s in stop) if position >= 0]
    return text[: min(ends)] if ends else text


def solve(model: nn.Module, tokenizer: Tokenizer, task: Task, examples: Sequence[Example],
          batch_size: int, quiet: bool = False) -> list[dict[str, Any]]:  # fmt: skip
    """One record a problem: prompt, generated, answer, correct. Prompts of like length are batched."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    records: dict[int, dict[str, Any]] = {}
    for start in tqdm(range(0, len(order), batch_size), desc=f"Evaluate ({task.name})", unit="batch",
                      disable=quiet or None):  # fmt: skip
        chosen = order[start : start + batch_size]
        prompts = [examples[i].prompt for i in chosen]
        for i, text in zip(chosen, generate(model, tokenizer, prompts, task.max_new_tokens, task.stop), strict=True):
            records[i] = {"prompt": examples[i].prompt, "generated": text, "answer": examples[i].answer,
                          "correct": task.is_correct(text, examples[i])}  # fmt: skip
    return [records[i] for i in range(len(examples))]
