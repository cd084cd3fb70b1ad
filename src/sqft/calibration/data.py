"""Text from a file, a ``datasets`` name or the built-in sample, and seeded blocks of its tokens."""

from __future__ import annotations

import gzip
import math
import os
import random
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from sqft.errors import Note, SqftError, UsageError, first_line
from sqft.models.types import Tokenizer
from sqft.strict import parse_json

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
LONGEST = 2**24  # bytes of a line, or of a paragraph: a tokenizer takes a hundred times as many


class Record(dict[str, Any]):
    """The fields of one record, and where it stands: "data.jsonl:3", for messages."""

    def __init__(self, fields: Mapping[str, Any], at: str) -> None:
        super().__init__(fields)
        self.at = at

    def text(self, field: str) -> str:
        """A field as text; a number is written out. Raises SqftError for what is neither (null, NaN, a list)."""
        value = self[field]
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if isinstance(value, str) or number:
            return str(value)
        kinds = {type(None): "null", float: "NaN", bool: "true or false", list: "a list", dict: "an object"}
        what = kinds.get(type(value), f"a {type(value).__name__}")
        raise SqftError(f"{self.at}: field '{field}' is {what}, not text: give it a text, or leave the record out")


def read_records(source: str) -> list[Record]:
    """The records of a source, each a dict of fields; a text's paragraphs become ``{"text": ...}``.

    Args:
        source: 'builtin' (a text that ships with sqft), a .txt or .jsonl file (also .gz), or a ``datasets`` name or
            folder, 'name', 'name:config', 'name@split' or 'name:config@split'; the split is 'train' if not named.

    Raises UsageError for a missing file, SqftError for a line that is not JSON or a data set that does not load.
    """
    if source == "builtin":
        source = str(resources.files("sqft.calibration") / "builtin.txt")
    path = Path(source)
    if not source.endswith(SUFFIXES) and (os.path.isdir(path) or not os.path.lexists(path)):
        return _read_dataset(source)
    check_regular(path)
    if not source.endswith(SUFFIXES):
        raise UsageError(f"{source} is neither text nor JSON lines: name a file ending in {', '.join(SUFFIXES)}, or a "
                         "folder of .csv or .parquet files")  # fmt: skip
    records = _paragraphs(path) if ".txt" in path.suffixes[-2:] else _objects(path)
    if not records:
        raise SqftError(f"{path} is empty: write a record a line, or paragraphs of text")
    return records


def check_regular(path: Path) -> None:
    """Raises UsageError for what is no file: a folder, or a pipe or device, which may never end, and is read twice."""
    if not os.path.lexists(path):
        raise UsageError(f"there is no file {path}")
    if not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "a link to nothing, a pipe or a device"
        raise UsageError(f"{path} is {what}, not a file: write the data to one and name that")


def lines_of(path: Path, longest: int = LONGEST) -> Iterator[str]:
    """The lines of a text file, ending in \\n, without a byte-order mark. Raises SqftError for one that is not UTF-8,
    and for a longer one: reading or tokenizing it would take all memory."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            while line := stream.readline(longest + 1):
                number += 1
                check_length(len(line), f"{path}:{number}", "a line", longest)
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n").replace("\r", "\n")
                if "\0" in text:
                    raise SqftError(f"{path}:{number}: a zero byte: this is no text in UTF-8")
                yield text
    except UnicodeDecodeError as error:
        raise SqftError(f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line): convert the file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise SqftError(f"cannot read {path} after line {number}: {error}") from None


def read_input(stream: TextIO) -> str:
    """What standard input holds. Raises SqftError for what is not UTF-8, and for more than a line may have."""
    try:
        text = stream.read(LONGEST + 1)
        text.encode()  # what is no text may have been let pass, as halves of characters
    except UnicodeError:
        raise SqftError("standard input is not UTF-8: convert it") from None
    check_length(len(text), "standard input", "a prompt")
    return text


def check_length(size: int, at: str, what: str, longest: int = LONGEST) -> None:
    if size > longest:
        raise SqftError(f"{at}: {what} of more than {longest:,} bytes: break it up")


def _paragraphs(path: Path) -> list[Record]:
    records, number = [], 1
    for part in "".join(lines_of(path)).split("\n\n"):
        check_length(len(part), f"{path}:{number}", "a paragraph")
        if part.strip():
            records.append(Record({"text": part}, f"{path}:{number}"))
        number += part.count("\n") + 2
    return records


def _objects(path: Path) -> list[Record]:
    lines = ((line, f"{path}:{number}") for number, line in enumerate(lines_of(path), 1) if line.strip())
    return [Record(_object(line, at), at) for line, at in lines]


def parse_record(text: str, at: str) -> Any:
    """JSON, in which NaN is nothing. Raises SqftError."""
    try:
        return parse_json(text, data=True, nan=False, most=len(text))
    except ValueError as error:
        raise SqftError(f"{at}: not JSON ({str(error).split(' for integer string')[0]})") from None


def _object(line: str, at: str) -> dict[str, Any]:
    record = parse_record(line, at)
    if not isinstance(record, dict):
        raise SqftError(f"{at}: a line has to be a JSON object with named fields")
    return record


def _read_dataset(source: str) -> list[Record]:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    try:
        rows = list(datasets.load_dataset(name, config or None, split=split or "train"))  # pyright: ignore
    except Exception as error:  # datasets raises many kinds; each is a source that cannot be read
        reason = first_line(error)
        raise SqftError(f"'{source}' is no file, and as a datasets name it does not load: {reason}") from error
    if not rows:
        raise SqftError(f"{source} is empty")
    return [Record(row, f"{source}, row {number}") for number, row in enumerate(rows, 1)]  # pyright: ignore


def read_texts(source: str) -> list[str]:
    """The ``text`` field of every record that is not blank: how many are is said. Raises SqftError if a record has
    none, or if all are blank."""
    records = read_records(source)
    if lacking := next((record for record in records if "text" not in record), None):
        raise SqftError(f"{lacking.at}: the record has no 'text' field but {', '.join(lacking)}")
    texts = [text for record in records if (text := record.text("text")).strip()]
    if not texts:
        raise SqftError(f"{source} is empty: all of its {len(records)} texts are blank")
    if blank := len(records) - len(texts):
        warnings.warn(f"{source}: {blank} of {len(records)} texts are blank, and left out", Note, stacklevel=2)
    return texts


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
