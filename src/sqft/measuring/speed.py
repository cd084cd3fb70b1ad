"""How fast a model that is served writes."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

PROMPT_TOKENS = 32


@torch.no_grad()
def decode_speed(model: Any, tokens: int = 32, rounds: int = 3) -> float:
    """Tokens a second of greedy decoding, batch 1, after a prompt of 32 tokens: the median of the rounds.

    The prompt's own time is taken out. Packed weights are de-quantized in every step, as they are when such a model is
    used through this package; runtimes with kernels of their own are faster.
    """
    model.eval()
    device = next(model.parameters()).device
    prompt = torch.arange(PROMPT_TOKENS, device=device)[None] % model.config.get_text_config().vocab_size
    seconds = {n: [] for n in (1, tokens + 1)}
    for _ in range(rounds):
        for n, times in seconds.items():
            started = time.perf_counter()
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n,
                           do_sample=False, pad_token_id=0)  # fmt: skip
            times.append(time.perf_counter() - started)
    first, all_of_them = (median(times) for times in seconds.values())
    return tokens / max(all_of_them - first, 1e-9)
