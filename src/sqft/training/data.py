"""From a task or a file to tokenized training sequences."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sqft.calibration.data import read_records
from sqft.config import TrainConfig
from sqft.errors import SqftError, UsageError
from sqft.models.types import Tokenizer
from sqft.tasks.base import Example, Task, without_duplicates
from sqft.tasks.lookup import get_task

IGNORED = -100  # label of a token without loss, as in transformers

Row = dict[str, list[int]]  # input_ids and labels of one sequence; perhaps its index, alone in a list


class TrainingData(NamedTuple):
    """Examples to learn, examples to evaluate on meanwhile (maybe none), and what was found about the splits."""

    examples: Sequence[Example]
    evaluation: Sequence[Example]
    notes: dict[str, Any]


def load_examples(config: TrainConfig) -> TrainingData:
    """What the config's task or data holds."""
    if config.task:
        return _of_task(config, get_task(config.task, config.data_dir))
    if not config.data:
        raise UsageError("nothing to train on: give a task (e.g. gsm8k) or data (a file or datasets name)")
    train = fill_templates(read_records(config.data), config.prompt, config.completion, config.data)
    evaluation = []
    if config.eval_data:
        evaluation = fill_templates(read_records(config.eval_data), config.prompt, config.completion, config.eval_data)
    return TrainingData(train[: config.limit], evaluation[: config.eval_limit], {})


def _of_task(config: TrainConfig, task: Task) -> TrainingData:
    """Without the training examples that are in the validation or test split too: they are counted and left out."""
    evaluation = task.examples("validation") if "validation" in task.splits else []
    notes: dict[str, Any] = {}
    others = list(evaluation)
    try:
        others += task.examples("test") if "test" in task.splits else []
    except SqftError as error:  # it is not here: it cannot be looked through
        notes["test_split_not_checked"] = str(error)
    examples = task.examples("train")
    kept = without_duplicates(examples, others)
    notes["duplicates_left_out"] = len(examples) - len(kept)
    return TrainingData(first_of_each(kept, config.limit), first_of_each(evaluation, config.eval_limit), notes)


def first_of_each(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """The first ``limit`` examples of each task."""
    taken: Counter[str] = Counter()
    chosen = []
    for example in examples:
        taken[example.task] += 1
        if limit is None or taken[example.task] <= limit:
            chosen.append(example)
    return chosen


def fill_templates(records: Sequence[dict[str, Any]], prompt: str, completion: str, source: str) -> list[Example]:
    r"""Fills ``{field}`` in both templates from each record; ``\n`` in a template is a line break. Raises UsageError
    for a field that a record lacks."""
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


def tokenize(example: Example, tokenizer: Tokenizer, completion_only: bool = True) -> Row:
    """``input_ids`` and ``labels`` of prompt + completion + end of text.

    Both are tokenized together, as generation will see them: alone, a completion would get another first token from
    tokenizers that put a space before every text (Mistral's, Phi-3's). The prompt is what they have in common.
    """
    prompt: Any = tokenizer(example.prompt)["input_ids"]
    ids: list[int] = list(tokenizer(example.prompt + example.completion)["input_ids"])  # pyright: ignore
    start = next((i for i, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other),
                 min(len(prompt), len(ids)))  # fmt: skip
    end: Any = tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    labels = [IGNORED] * start + ids[start:] if completion_only else list(ids)
    return {"input_ids": ids, "labels": labels}


def tokenize_all(examples: Sequence[Example], tokenizer: Tokenizer, config: TrainConfig) -> list[Row]:
    """All examples, cut to ``max_length``, or blocks of it when packing. Raises SqftError if no token is left to learn
    from."""
    rows = [tokenize(example, tokenizer, config.completion_only) for example in examples]
    rows = [{key: values[: config.max_length] for key, values in row.items()} for row in rows]
    if config.packing:
        rows = pack_rows(rows, config.max_length)
    rows = [row for row in rows if is_learnt(row)]
    if not rows:
        raise SqftError(f"no completion fits into max_length {config.max_length}: raise it, or check the templates")
    return rows


def is_learnt(row: Row) -> bool:
    """Whether a token of the row is predicted and has a loss; the first one is never predicted."""
    return any(label != IGNORED for label in row["labels"][1:])


def pack_rows(rows: Sequence[Row], length: int) -> list[Row]:
    """Concatenates rows and cuts the stream into blocks of ``length`` (the last one may be shorter)."""
    stream = {key: [value for row in rows for value in row[key]] for key in ("input_ids", "labels")}
    starts = range(0, len(stream["input_ids"]), length)
    return [{key: values[i : i + length] for key, values in stream.items()} for i in starts]


def padding(tokenizer: Tokenizer) -> int:
    """The token that fills rows up; what it is does not matter where it is masked."""
    token: Any = tokenizer.pad_token_id
    return token or 0


def padded(rows: Sequence[Sequence[int]], fill: int, left: bool = False) -> Tensor:
    """int64 [N, T]: the rows, filled up to the longest."""
    longest = max(map(len, rows))
    gaps = [[fill] * (longest - len(row)) for row in rows]
    return torch.tensor([[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)])


def collate(rows: Sequence[Row], fill: int) -> dict[str, Tensor]:
    """A batch, padded on the right, as a model takes it; with ``index`` [N] if rows have theirs."""
    ids = [row["input_ids"] for row in rows]
    index = {"index": torch.tensor([row["index"][0] for row in rows])} if "index" in rows[0] else {}
    return index | {"input_ids": padded(ids, fill), "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED)}  # fmt: skip
