"""How much text a stage would read and write, from data that is here, or whose sizes are known."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

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


class NotHere(Exception):
    """Data is on the hub, and nothing is known of its size."""


def of_training(config: TrainConfig) -> Lengths:
    """Raises NotHere, and UsageError as training would, for a task or data that does not exist."""
    if config.task and not _is_here(config):
        get_task(config.task)
        return _known(config.task, "train", config.limit)
    if config.data and not config.data.endswith(SUFFIXES) and not Path(config.data).exists():
        raise NotHere
    return _lengths(load_examples(config).examples)


def of_problems(config: SearchConfig | EvaluateConfig, tuned: bool) -> tuple[Lengths, int]:
    """A split's lengths, and the tokens that are generated a problem, 0 if options are scored. A model that was not
    tuned seldom stops before it has to; one that was goes on until the last sequence of a batch ends, about the longest
    completion of 32. Raises NotHere, and UsageError for a task or split that does not exist."""
    if isinstance(config, SearchConfig) and (config.split == "test" or not config.task or _is_here(config)):
        from sqft.searching.evaluator import search_task

        search_task(config)
    task = get_task(config.task or "", config.data_dir)
    if config.split not in task.splits:
        raise UsageError(f"task {config.task} has no split '{config.split}': it has {', '.join(task.splits)}")
    examples = task.examples(config.split, config.limit) if _is_here(config) else []
    lengths = _lengths(examples) or _known(task.name, config.split, config.limit)
    longest = sorted(completion for _, completion in lengths)[-max(1, len(lengths) // 32)]
    generated = min(task.max_new_tokens, longest) if tuned else task.max_new_tokens
    return lengths, 0 if examples and examples[0].options else generated


def of_text(source: str, most: int | None) -> int:
    """Tokens of a text, of which the first ``most`` are used. Raises NotHere."""
    if source == "builtin" or source.endswith(SUFFIXES):
        total = sum(map(_tokens, read_texts(source)))
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


def _tokens(text: str) -> int:
    return round(len(text) / CHARACTERS)


def _lengths(examples: Sequence[Example]) -> Lengths:
    """Of a multiple-choice problem the completions of all options count."""
    return [(_tokens(e.prompt), sum(_tokens(text) + 1 for _, text in e.options or [("", e.completion)]))
            for e in examples]  # fmt: skip
