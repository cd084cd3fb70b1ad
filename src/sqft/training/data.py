"""From a task or a file to tokenized training sequences."""

from __future__ import annotations

import string
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sqft.calibration.data import Record, read_records
from sqft.config import TrainConfig
from sqft.errors import Note, SqftError, UsageError
from sqft.models.types import Tokenizer
from sqft.tasks.base import Example, Task, without_duplicates
from sqft.tasks.lookup import get_task

IGNORED = -100  # label of a token without loss, as in transformers

_SAID = {"empty_completions": "without a completion (left out)", "cut": "cut",
         "cut_to_nothing": "without room for their completion (left out)"}  # fmt: skip

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
    train = fill_templates(read_records(config.data), config.prompt, config.completion)
    evaluation = []
    if config.eval_data:
        evaluation = fill_templates(read_records(config.eval_data), config.prompt, config.completion)
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
    if not kept:
        raise SqftError(f"all {len(examples)} training examples of task {task.name} are in its validation or test "
                        "split too: nothing is left to train on")  # fmt: skip
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


def fill_templates(records: Sequence[Record], prompt: str, completion: str) -> list[Example]:
    r"""Fills ``{field}`` in both templates from each record; ``\n`` in a template is a line break. Raises UsageError
    for a template that is none, and for a field that a record lacks, SqftError for one that is no text."""
    parsed = [_parse("prompt", prompt), _parse("completion", completion)]
    fields = {field for template in parsed for _, field in template if field is not None}
    filled = []
    for record in records:
        if lacking := fields - record.keys():
            raise UsageError(f"{record.at}: the record has no field '{min(lacking)}' that the template asks for: it "
                             f"has {', '.join(record)}")  # fmt: skip
        texts: dict[str | None, str] = {None: "", **{field: record.text(field) for field in fields}}
        before, after = ("".join(text + texts[field] for text, field in template) for template in parsed)
        filled.append(Example(before, after))
    return filled


def _parse(name: str, template: str) -> list[tuple[str, str | None]]:
    """A template as texts, each with the field that follows it. Raises UsageError, naming the option."""
    try:
        parts = list(string.Formatter().parse(template.replace("\\n", "\n")))
        if wrong := next((part for part in parts if part[2] or part[3] or part[1] == ""), None):
            raise ValueError(
                f"'{{{wrong[1]}}}' with '{wrong[2] or wrong[3]}'" if wrong[1] else "a field without a name"
            )
    except ValueError as error:
        raise UsageError(
            f"{name} '{template}' is no template ({error}): fields are {{name}}, braces {{{{ and }}}}"
        ) from None
    return [(text, field) for text, field, _, _ in parts]


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


def tokenize_all(examples: Sequence[Example], tokenizer: Tokenizer, config: TrainConfig,
                 notes: dict[str, Any] | None = None) -> list[Row]:  # fmt: skip
    """All examples that have something to learn, cut to ``max_length``, or blocks of it when packing. How many were
    left out or cut is said, and put into ``notes``. Raises SqftError if no token is left to learn from."""
    kept = [e for e in examples if e.completion.strip() or (e.prompt.strip() and not config.completion_only)]
    whole = [tokenize(example, tokenizer, config.completion_only) for example in kept]
    cut = [{key: values[: config.max_length] for key, values in row.items()} for row in whole]
    rows = [row for row in (pack_rows(cut, config.max_length) if config.packing else cut) if is_learnt(row)]
    longer = sum(len(row["input_ids"]) > config.max_length for row in whole)
    nothing = 0 if config.packing else len(cut) - len(rows)
    counts = {"empty_completions": len(examples) - len(kept), "cut_to_nothing": nothing, "cut": longer - nothing}
    said = ", ".join(f"{count} {_SAID[name]}" for name, count in counts.items() if count > 0)
    if not rows:
        raise SqftError(f"nothing to learn: of {len(examples)} examples {said}: raise max_length "
                        f"({config.max_length}), or check the templates")  # fmt: skip
    if said:
        warnings.warn(f"of {len(examples)} examples {said}; max_length is {config.max_length}", Note, stacklevel=2)
    if notes is not None:
        notes.update({name: count for name, count in counts.items() if count > 0})
    if tokenizer.eos_token_id is None:
        warnings.warn(
            "the tokenizer has no end-of-text token: completions are learnt without an end", Note, stacklevel=2
        )
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
