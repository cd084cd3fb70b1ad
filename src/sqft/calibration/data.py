"""Text from a file, a ``datasets`` name or the built-in sample, and seeded blocks of its tokens."""

from __future__ import annotations

import gzip
import random
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.errors import SqftError, UsageError, first_line
from sqft.models.types import Tokenizer
from sqft.strict import parse_json

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


def read_records(source: str) -> list[dict[str, Any]]:
    """The records of a source, each a dict of fields; a text's paragraphs become ``{"text": ...}``.

    Args:
        source: 'builtin' (a text that ships with sqft), a .txt or .jsonl file (also .gz), or a ``datasets`` name or
            folder, 'name', 'name:config', 'name@split' or 'name:config@split'; the split is 'train' if not named.

    Raises UsageError for a missing file, SqftError for a line that is not JSON or a data set that does not load.
    """
    if source == "builtin":
        source = str(resources.files("sqft.calibration") / "builtin.txt")
    path = Path(source)
    if source.endswith(SUFFIXES):
        return _read_file(path)
    if path.is_file():
        raise UsageError(f"{source} is neither text nor JSON lines: name a file ending in {', '.join(SUFFIXES)}")
    return _read_dataset(source)


def _read_file(path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
            text = stream.read()
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SqftError(f"cannot read {path}: {error}") from None
    if ".txt" in path.suffixes[-2:]:
        records: list[dict[str, Any]] = [{"text": part} for part in text.split("\n\n") if part.strip()]
    else:
        records = [_parse(path, i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not records:
        raise SqftError(f"{path} is empty")
    return records


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = parse_json(line, data=True)
    except ValueError as error:
        raise SqftError(f"{path}:{number}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise SqftError(f"{path}:{number}: a line has to be a JSON object with named fields")
    return record


def _read_dataset(source: str) -> list[dict[str, Any]]:
    import datasets

    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    try:
        return list(datasets.load_dataset(name, config or None, split=split or "train"))  # pyright: ignore
    except Exception as error:  # datasets raises many kinds; each is a source that cannot be read
        reason = first_line(error)
        raise SqftError(f"'{source}' is no file, and as a datasets name it does not load: {reason}") from error


def read_texts(source: str) -> list[str]:
    """The ``text`` field of every record. Raises SqftError if a record has none."""
    records = read_records(source)
    if "text" not in records[0]:
        raise SqftError(f"records of {source} have no 'text' field but {', '.join(records[0])}")
    return [record["text"] for record in records if record["text"].strip()]


def token_stream(tokenizer: Tokenizer, texts: list[str], enough: int | None = None) -> Tensor:
    """All texts in one int64 [T], or the first ones until T >= enough, with a blank line between them: Wanda's and
    GPTQ's evaluations do so, and an end-of-text token would, in a chat model, be the end of a turn."""
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore
        if enough is not None and len(tokens) >= enough:
            break
    return torch.tensor(tokens)


def token_blocks(tokenizer: Tokenizer, texts: list[str], samples: int, length: int, seed: int,
                 name: str = "the text") -> Tensor:  # fmt: skip
    """int64 [samples, length]: blocks at seeded random places of the shuffled texts, which a message calls ``name``.
    Raises SqftError if they have fewer than ``length`` tokens."""
    order = random.Random(seed)
    order.shuffle(texts := list(texts))
    stream = token_stream(tokenizer, texts, enough=4 * samples * length)
    if len(stream) < length:
        raise SqftError(f"{name} has {len(stream)} tokens, fewer than one block of {length}: choose a shorter length")
    starts = [order.randint(0, len(stream) - length) for _ in range(samples)]
    return with_bos(tokenizer, torch.stack([stream[start : start + length] for start in starts]))


def with_bos(tokenizer: Tokenizer, blocks_NT: Tensor) -> Tensor:
    """The blocks, each with the begin-of-text token in its first place, if the tokenizer itself puts one before a text.

    Families that were trained so (Gemma, Llama) are not themselves without it: Gemma's perplexity more than doubles.
    The first token of a window is never predicted, so no prediction is lost by its replacement.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or tokenizer("a")["input_ids"][0] != bos:  # pyright: ignore[reportIndexIssue]
        return blocks_NT
    return torch.cat([torch.full_like(blocks_NT[:, :1], bos), blocks_NT[:, 1:]], 1)
