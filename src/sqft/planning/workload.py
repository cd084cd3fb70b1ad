"""How much text a stage would read and write, from data that is here, or whose sizes are known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqft.calibration.data import SUFFIXES, read_texts
from sqft.config import EvaluateConfig, SearchConfig, TrainConfig
from sqft.errors import SqftError, UsageError
from sqft.models.dense import load_tokenizer, locate
from sqft.tasks.base import Example
from sqft.tasks.lookup import get_task
from sqft.training.data import load_examples

CHARACTERS = 2.8  # a token, of GSM8K and of arithmetic in SmolLM2's tokenizer; prose has more
TOKENIZED = 500  # examples that are counted; the others are taken to be like them

# Tokens of prompt and completion in SmolLM2's tokenizer: 16 examples of GSM8K's train that stand for all.
_GSM8K = ((44, 79), (67, 139), (39, 58), (102, 185), (50, 111), (55, 97), (53, 80), (66, 116), (56, 115), (65, 154),
          (72, 272), (50, 62), (78, 157), (95, 160), (61, 132), (49, 93))  # fmt: skip
KNOWN = {"gsm8k": ({"train": 7217, "validation": 256, "test": 1319}, _GSM8K)}

Lengths = Sequence[tuple[int, int]]  # of each example: tokens of the prompt, and of the completion with its end
Count = Callable[[str], int]


@dataclass(frozen=True)
class Workload:
    """``generated``: tokens that are generated a problem, 0 if it is scored by forward passes; ``text``: tokens of a
    text."""

    lengths: Lengths = ()
    evaluation: Lengths = ()
    generated: float = 0
    text: int = 0


def counter(source: str) -> Count:
    """Tokens of a text: by the model's tokenizer if it lies here, else by its characters."""
    try:
        if Path(source).exists() and locate(source)[1] is None:
            tokenizer = load_tokenizer(source)
            return lambda text: len(tokenizer(text, verbose=False)["input_ids"])  # pyright: ignore
    except SqftError:
        pass
    return lambda text: round(len(text) / CHARACTERS)


def of_training(config: TrainConfig, count: Count) -> Workload | None:
    """None if the data is not here. Raises UsageError as training would, for a task or data that does not exist."""
    if config.task and not _is_here(config):
        get_task(config.task)
        train = _known(config.task, "train", config.limit)
        return Workload(train, _known(config.task, "validation", config.eval_limit) or ()) if train else None
    if config.data and not config.data.endswith(SUFFIXES) and not Path(config.data).exists():
        return None  # on the hub
    data = load_examples(config)
    return Workload(_lengths(data.examples, count), _lengths(data.evaluation, count))


def of_task(config: SearchConfig | EvaluateConfig, tuned: bool, count: Count) -> Workload | None:
    """Of a search or evaluation. A model that was not tuned seldom stops before it has to; one that was goes on until
    the last sequence of a batch ends, about the longest completion of 32.

    None if the data is not here. Raises UsageError for a task or split that does not exist.
    """
    text = _text(config, count) if isinstance(config, EvaluateConfig) and config.text else 0
    if text is None or not config.task:
        return None if text is None else Workload(text=text)
    task = get_task(config.task, config.data_dir)
    if config.split not in task.splits:
        raise UsageError(f"task {config.task} has no split '{config.split}': it has {', '.join(task.splits)}")
    examples = task.examples(config.split, config.limit) if _is_here(config) else []
    lengths = _lengths(examples, count) or _known(config.task, config.split, config.limit)
    if not lengths:
        return None
    longest = sorted(completion for _, completion in lengths)[-max(1, len(lengths) // 32)]
    generated = min(task.max_new_tokens, longest) if tuned else task.max_new_tokens
    return Workload(lengths, (), 0 if examples and examples[0].options else generated, text)


def _is_here(config: TrainConfig | SearchConfig | EvaluateConfig) -> bool:
    """Whether a task's data can be read without the network."""
    return config.data_dir is not None or config.task == "arithmetic"


def _known(task: str, split: str, limit: int | None) -> Lengths | None:
    if task not in KNOWN:
        return None
    counts, examples = KNOWN[task]
    return list(
        itertools.islice(itertools.cycle(examples), counts[split] if limit is None else min(limit, counts[split]))
    )


def _lengths(examples: Sequence[Example], count: Count) -> Lengths:
    """Of a multiple-choice problem the completions of all options count."""
    found = [(count(e.prompt), sum(count(text) for _, text in e.options) if e.options else count(e.completion) + 1)
             for e in examples[:: max(1, len(examples) // TOKENIZED)]]  # fmt: skip
    return list(itertools.islice(itertools.cycle(found), len(examples)))


def _text(config: EvaluateConfig, count: Count) -> int | None:
    """Tokens of an evaluation's text; as many as it asks for if that is on the hub."""
    if not config.text or (config.text != "builtin" and not config.text.endswith(SUFFIXES)):
        return config.max_tokens
    total = sum(count(text) for text in read_texts(config.text))
    return total if config.max_tokens is None else min(total, config.max_tokens)
