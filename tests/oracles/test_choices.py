"""Log-likelihoods of options against one plain forward pass a row, for every family."""

from __future__ import annotations

import random

import pytest
import torch
from pico import FAMILIES, pico_model, pico_tokenizer

from sqft.evaluation.choices import choose, encode_pair, likelihoods
from sqft.tasks.base import Example


@pytest.mark.parametrize(
    "family", [*FAMILIES, "gemma3n_text", "gemma4_text", "mllama", "nemotron_h", "lfm2", "falcon_h1"]
)
def test_log_likelihoods_equal_a_forward_of_each_row(family: str) -> None:
    """Contexts of other lengths than their neighbours', longer than a sliding window too; one and more options."""
    model, draw = pico_model(family), random.Random(0)
    pairs = []
    for length, options in ((3, 4), (30, 2), (11, 1), (40, 4), (1, 3)):
        context = [draw.randrange(256) for _ in range(length)]
        for _ in range(options):
            n = draw.randint(1, 6)
            pairs.append(([*context, *(draw.randrange(256) for _ in range(n))], n))
    expected = []
    for tokens, n in pairs:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        expected.append(sum(float(logits[t - 1, tokens[t]]) for t in range(len(tokens) - n, len(tokens))))
    for batch_size in (1, 5, 100):
        found = [value for value, _ in likelihoods(model, pairs, batch_size, quiet=True)]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_choose_and_its_lengths() -> None:
    """The likeliest option wins; normalised, the likeliest a character; contexts may be what differs."""
    model, tokenizer = pico_model(), pico_tokenizer()
    options = tuple(("Q", f" {text}") for text in ("a", "a much longer option", "bb"))
    problems = [
        Example(*options[0], "a", options, 0),
        Example("Q b", " tail", "Q b", (("Q a", " tail"), ("Q b", " tail")), 1),
    ]
    first, second = choose(model, tokenizer, problems, 8, quiet=True)
    scores = first["log_likelihoods"]
    assert scores == pytest.approx(
        [likelihoods(model, [encode_pair(tokenizer, *o)], 1, quiet=True)[0][0] for o in options], rel=1e-5
    )
    best = max(range(3), key=lambda i: scores[i])
    normed = max(range(3), key=lambda i: scores[i] / (1, 20, 2)[i])
    assert first["generated"] == options[best][1][1:] and first["correct"] == (best == 0)
    assert first["correct_norm"] == (normed == 0)
    assert second["generated"] in ("Q a", "Q b") and second["correct"] == (second["generated"] == "Q b")


def test_a_trailing_space_belongs_to_the_continuation() -> None:
    tokenizer = pico_tokenizer()
    assert encode_pair(tokenizer, "ab ", "cd") == encode_pair(tokenizer, "ab", " cd")
    assert encode_pair(tokenizer, "ab", " cd")[1] == 3
