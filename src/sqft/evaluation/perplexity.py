"""Perplexity of a text, in windows that do not overlap. Shape letters: N windows, T tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from sqft.calibration.data import read_texts, token_stream, with_bos
from sqft.errors import SqftError
from sqft.evaluation.intervals import normal
from sqft.models.discover import input_device
from sqft.models.types import Tokenizer


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: Tokenizer, source: str, length: int,
               max_tokens: int | None = None, batch_size: int = 1) -> dict[str, Any]:  # fmt: skip
    """exp of the mean negative log-likelihood a token, with a 95 % interval from the windows' means, of two or more.

    The text is one stream of tokens cut into windows of ``length``; each token but a window's first is predicted from
    those before it in the window, which begins with the begin-of-text token if the tokenizer puts one before a text. A
    last window that is not full is left out unless it is the only one.
    """
    stream = token_stream(tokenizer, read_texts(source), enough=max_tokens)[:max_tokens]
    if len(stream) < 2:
        raise SqftError(f"{source} has fewer than 2 tokens")
    length = min(length, len(stream))
    windows = with_bos(tokenizer, stream[: len(stream) // length * length].view(-1, length))
    device = input_device(model)
    losses: list[float] = []
    for batch_NT in tqdm(windows.split(batch_size), desc="Perplexity", unit="batch", disable=None):
        batch_NT = batch_NT.to(device)
        logits = model(input_ids=batch_NT, use_cache=False).logits
        for i, target in enumerate(batch_NT):  # by window: float32 logits of one only
            losses.append(float(F.cross_entropy(logits[i, :-1].float(), target[1:])))
        del logits  # before the next are made
    found = {"perplexity": math.exp(sum(losses) / len(losses)), "tokens": windows.numel(), "windows": len(losses)}
    return found | ({"perplexity_ci95": [math.exp(end) for end in normal(losses)]} if len(losses) > 1 else {})
