"""Multiple choice by log-likelihood: of the options, the one that the model finds likeliest.

As in lm-evaluation-harness: a continuation's tokens are what it and its context together have after the context's;
``accuracy`` compares log-likelihoods, ``accuracy_norm`` those divided by the option's length in characters.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sqft.errors import UsageError
from sqft.evaluation.head import rows_together
from sqft.models.discover import input_device
from sqft.models.types import Tokenizer
from sqft.tasks.base import Example
from sqft.training.data import padded


def choose(model: Any, tokenizer: Tokenizer, examples: Sequence[Example], batch_size: int,
           quiet: bool = False) -> list[dict[str, Any]]:  # fmt: skip
    """One record a problem: prompt, generated (the text of the option chosen), answer, correct, correct_norm, and the
    options' log-likelihoods in nats. ``batch_size`` counts options."""
    pairs = [encode_pair(tokenizer, *option) for example in examples for option in example.options]
    scores = [value for value, _ in likelihoods(model, pairs, batch_size, quiet)]
    records, start = [], 0
    for example in examples:
        mine = scores[start : start + len(example.options)]
        start += len(example.options)
        texts = option_texts(example)
        normed = [score / max(1, len(text)) for score, text in zip(mine, texts, strict=True)]
        chosen = mine.index(max(mine))
        records.append({
            "prompt": example.prompt, "generated": texts[chosen], "answer": example.answer,
            "correct": chosen == example.gold, "correct_norm": normed.index(max(normed)) == example.gold,
            "log_likelihoods": mine,
        })  # fmt: skip
    return records


def option_texts(example: Example) -> list[str]:
    """What tells the options apart: their continuations, or their contexts if the continuation is one and the same."""
    if len({continuation for _, continuation in example.options}) == 1 and len(example.options) > 1:
        return [context for context, _ in example.options]
    return [continuation.removeprefix(" ") for _, continuation in example.options]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """Tokens of both together, one of them or more before the continuation, and how many are the continuation's."""
    stripped = context.rstrip()  # a trailing space belongs to the next word's token
    whole: Any = tokenizer(stripped + context[len(stripped) :] + continuation)["input_ids"]
    start: Any = tokenizer(stripped)["input_ids"]
    if not start:
        return [start_token(tokenizer), *whole], len(whole)
    return whole, len(whole) - len(start)


def start_token(tokenizer: Tokenizer) -> int:
    """What stands before a text that nothing stands before, as in lm-eval: begin of text, or else end of text."""
    token: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise UsageError("a problem begins with an empty text, and the tokenizer has no token for its begin")
    return token


@torch.no_grad()
def likelihoods(model: Any, pairs: Sequence[tuple[list[int], int]], batch_size: int,
                quiet: bool = False) -> list[tuple[float, bool]]:  # fmt: skip
    """Of the last n >= 1 tokens of each row (tokens, n): the sum of their log-probabilities, in nats, and whether they
    are what greedy decoding gives.

    Rows that share the tokens before those n share their forward pass: a question is read once for all its options.
    What a model with convolutions remembers is a state, which is not given to several rows: it reads each as a whole.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    score = _score_whole if any(isinstance(m, nn.Conv1d) for m in core.get_decoder().modules()) else _score
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (tokens, n) in enumerate(pairs):
        groups.setdefault(tuple(tokens[:-n]), []).append(i)
    ordered = sorted(groups.items(), key=lambda group: len(group[0]))
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    bar = tqdm(total=len(pairs), desc="Evaluate", unit="option", disable=quiet or None)
    with bar, rows_together(core):
        while ordered:
            batch, size = [], 0
            while ordered and (not batch or size + len(ordered[-1][1]) <= batch_size):
                batch.append(ordered.pop())
                size += len(batch[-1][1])
            members = [i for _, group in batch for i in group]
            values = score([prefix for prefix, _ in batch], [[pairs[i] for i in group] for _, group in batch], model)
            for i, value in zip(members, values, strict=True):
                scores[i] = value
            bar.update(size)
    return scores


def _score(prefixes: list[tuple[int, ...]], groups: list[list[tuple[list[int], int]]],
           model: Any) -> list[tuple[float, bool]]:  # fmt: skip
    """One batch: the prefixes, padded on the left, and from their cache all continuations, padded on the right."""
    device = input_device(model)
    tokens = padded(prefixes, 0, left=True).to(device)
    mask = padded([[1] * len(prefix) for prefix in prefixes], 0, left=True).to(device)
    out = _forward(model, tokens, mask, None)
    owner = torch.tensor([g for g, group in enumerate(groups) for _ in group], device=device)
    tails = [whole[-n:] for group in groups for whole, n in group]
    first = out.logits[:, -1].float().log_softmax(-1)
    heads = torch.tensor([tail[0] for tail in tails], device=device)
    values, greedy = first[owner, heads].double(), first.argmax(-1)[owner] == heads
    if max(map(len, tails)) > 1:
        cache = out.past_key_values
        cache.batch_select_indices(owner)
        inputs, targets = (padded(part, 0).to(device) for part in ([t[:-1] for t in tails], [t[1:] for t in tails]))
        kept = padded([[1] * (len(tail) - 1) for tail in tails], 0).to(device)
        logits = _forward(model, inputs, torch.cat([mask[owner], kept], 1), cache).logits
        picked = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        values += (picked * kept).double().sum(1)
        greedy &= ((logits.argmax(-1) == targets) | (kept == 0)).all(1)
    return list(zip(values.tolist(), greedy.tolist(), strict=True))


def _score_whole(prefixes: list[tuple[int, ...]], groups: list[list[tuple[list[int], int]]],
                 model: Any) -> list[tuple[float, bool]]:  # fmt: skip
    """The same by a forward of every row, padded on the right, where nothing that counts sees it."""
    rows = [row for group in groups for row in group]
    tokens = padded([whole for whole, _ in rows], 0).to(input_device(model))
    kept = tokens.shape[1] - min(len(whole) - n for whole, n in rows) + 1
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=kept).logits[:, :-1].float().log_softmax(-1)
    found = []
    for (whole, n), logits_TV in zip(rows, logits, strict=True):
        start = len(whole) - n - (tokens.shape[1] - kept) - 1
        of_row, targets = logits_TV[start : start + n], torch.tensor(whole[-n:], device=tokens.device)
        greedy = bool((of_row.argmax(-1) == targets).all())
        found.append((float(of_row.gather(-1, targets[:, None]).double().sum()), greedy))
    return found


def _forward(model: Any, tokens: Tensor, mask: Tensor, cache: Any) -> Any:
    """A forward of the last tokens of ``mask`` after those in ``cache``; of a prefix only the last logits are made."""
    given: dict[str, Any] = {"past_key_values": cache} if cache is not None else {"logits_to_keep": 1}
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" in inspect.signature(core.forward).parameters:  # others count by the mask
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return model(input_ids=tokens, attention_mask=mask, use_cache=True, **given)
