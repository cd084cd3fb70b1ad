"""How much text a stage would read and write, from data that is here, or whose sizes are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from sqft.calibration.data import SUFFIXES, read_texts
from sqft.config import EvaluateConfig, SearchConfig, TrainConfig
from sqft.errors import UsageError
from sqft.tasks.base import Example
from sqft.tasks.lookup import get_task
from sqft.training.data import load_examples

CHARACTERS = 2.8  # a token, of GSM8K and of arithmetic in SmolLM2's tokenizer; prose has more

# Examples of each split; tokens of prompt and completion in SmolLM2's tokenizer, of 16 of train that stand for all.
KNOWN = {"gsm8k": ({"train": 7217, "validation": 256, "test": 1319}, (
    (44, 79), (67, 139), (39, 58), (102, 185), (50, 111), (55, 97), (53, 80), (66, 116), (56, 115), (65, 154),
    (72, 272), (50, 62), (78, 157), (95, 160), (61, 132), (49, 93)))}  # fmt: skip

Lengths = Sequence[tuple[int, int]]  # of each example: tokens of the prompt, and of the completion with its end
Count = Callable[[Sequence[str]], list[int]]


class Problems(NamedTuple):
    """Of a split: lengths, the tokens that are generated a problem, 0 if options are scored; the longest completion."""

    lengths: Lengths
    generated: int
    longest: int


def counted(texts: Sequence[str], tokenizer: Any = None) -> list[int]:
    """About how many tokens each of the texts has, by its characters and the tokens of some of all."""
    sample = [text for text in texts[:: len(texts) // 256 + 1] if text] if tokenizer else []
    tokens = sum(map(len, tokenizer(sample, add_special_tokens=False)["input_ids"])) if sample else 0
    each = sum(map(len, sample)) / tokens if tokens else CHARACTERS
    return [round(len(text) / each) for text in texts]


class NotHere(Exception):
    """Data is on the hub, and nothing is known of its size."""


def of_training(config: TrainConfig, count: Count) -> Lengths:
    """Raises NotHere, and UsageError as training would, for a task or data that does not exist."""
    if config.task and not _is_here(config):
        get_task(config.task)
        return _known(config.task, "train", config.limit)
    if config.data and not config.data.endswith(SUFFIXES) and not Path(config.data).exists():
        raise NotHere
    return _lengths(load_examples(config).examples, count)[0]


def of_problems(config: SearchConfig | EvaluateConfig, tuned: bool, count: Count) -> Problems:
    """A split's. A model that was not tuned seldom stops before it has to; one that was goes on until the last sequence
    of a batch ends, about the longest completion of 32. Raises NotHere, and UsageError for no such task or split."""
    if isinstance(config, SearchConfig) and (config.split == "test" or not config.task or _is_here(config)):
        from sqft.searching.evaluator import search_task

        search_task(config)
    task = get_task(config.task or "", config.data_dir)
    if config.split not in task.splits:
        raise UsageError(f"task {config.task} has no split '{config.split}': it has {', '.join(task.splits)}")
    examples = task.examples(config.split, config.limit) if _is_here(config) else []
    lengths, longest = _lengths(examples, count) if examples else (_known(task.name, config.split, config.limit), 0)
    usual = sorted(completion for _, completion in lengths)[-max(1, len(lengths) // 32)]
    generated = min(task.max_new_tokens, usual) if tuned else task.max_new_tokens
    return Problems(lengths, 0 if examples and examples[0].options else generated, longest or usual)


def of_text(source: str, most: int | None, count: Count) -> int:
    """Tokens of a text, of which the first ``most`` are used. Raises NotHere."""
    if source == "builtin" or source.endswith(SUFFIXES):
        total = sum(count(read_texts(source)))
        return min(total, most or total)
    if most is None:
        raise NotHere
    return most


def _is_here(config: TrainConfig | SearchConfig | EvaluateConfig) -> bool:
    """Whether a task's data can be read without the network."""
    return config.data_dir is not None or config.task == "arithmetic"


def _known(task: str, split: str, limit: int | None) -> Lengths:
    if task not in KNOWN:
        raise NotHere
    counts, examples = KNOWN[task]
    return list(islice(cycle(examples), counts[split]))[:limit]


def _lengths(examples: Sequence[Example], count: Count) -> tuple[Lengths, int]:
    """And the longest completion. Of a multiple-choice problem the completions of all options count."""
    options = [[text for _, text in example.options or [("", example.completion)]] for example in examples]
    each = iter(count([text for texts in options for text in texts]))
    tokens = [[next(each) + 1 for _ in texts] for texts in options]
    prompts = count([example.prompt for example in examples])
    return list(zip(prompts, map(sum, tokens), strict=True)), max(map(max, tokens))
