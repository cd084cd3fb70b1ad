"""From a task or a file to tokenized training sequences."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqft.calibration.data import read_records
from sqft.config import TrainConfig
from sqft.errors import SqftError, UsageError
from sqft.tasks.base import Example, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token without loss, as in transformers


def load_examples(config: TrainConfig) -> tuple[list[Example], list[Example]]:
    """Training and evaluation examples of the config's task or data (the latter may be empty)."""
    if config.task:
        task = get_task(config.task)
        return task.examples("train", config.limit), task.examples("validation", config.eval_limit)
    if not config.data:
        raise UsageError("nothing to train on: give a task (e.g. arithmetic) or data (a file or datasets name)")
    train = fill_templates(read_records(config.data), config.prompt, config.completion, config.data)
    evaluation = []
    if config.eval_data:
        evaluation = fill_templates(read_records(config.eval_data), config.prompt, config.completion, config.eval_data)
    return train[: config.limit], evaluation[: config.eval_limit]


def fill_templates(records: Sequence[dict[str, Any]], prompt: str, completion: str, source: str) -> list[Example]:
    r"""Fills ``{field}`` in both templates from each record; ``\n`` in a template is a line break.

    Raises UsageError for a field that a record lacks.
    """
    prompt, completion = prompt.replace("\\n", "\n"), completion.replace("\\n", "\n")
    fields = {name for template in (prompt, completion) for _, name, _, _ in string.Formatter().parse(template) if name}
    for number, record in enumerate(records, 1):
        lacking = fields - record.keys()
        if lacking:
            raise UsageError(
                f"record {number} of {source} has no field '{min(lacking)}' that the template asks for: "
                f"it has {', '.join(record)}"
            )
    return [Example(prompt.format(**record), completion.format(**record)) for record in records]


def tokenize(example: Example, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> dict[str, list[int]]:
    """``input_ids`` and ``labels`` of prompt + completion + end of text, cut to ``max_length``."""
    prompt = tokenizer(example.prompt)["input_ids"]
    completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]  # pyright: ignore
    ids = [*prompt, *completion]  # pyright: ignore
    labels = [IGNORED] * len(prompt) + list(completion) if config.completion_only else list(ids)  # pyright: ignore
    return {"input_ids": ids[: config.max_length], "labels": labels[: config.max_length]}


def tokenize_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> list[dict[str, list[int]]]:
    """All examples, or blocks of ``max_length`` when packing. Raises SqftError if no token is left to learn from."""
    rows = [tokenize(example, tokenizer, config) for example in examples]
    if config.packing:
        rows = pack(rows, config.max_length)
    rows = [row for row in rows if any(label != IGNORED for label in row["labels"])]
    if not rows:
        raise SqftError(f"no completion fits into max_length {config.max_length}: raise it, or check the templates")
    return rows


def pack(rows: Sequence[dict[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    """Concatenates rows and cuts the stream into blocks of ``length`` (the last one may be shorter)."""
    stream = {key: [value for row in rows for value in row[key]] for key in ("input_ids", "labels")}
    starts = range(0, len(stream["input_ids"]), length)
    return [{key: values[i : i + length] for key, values in stream.items()} for i in starts]
