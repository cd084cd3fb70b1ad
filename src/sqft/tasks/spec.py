"""Tasks as YAML: where the data is, and Jinja templates that make a prompt and an answer from a record.

The built-in tasks are such files (``tasks/specs``); a file of one's own works the same. Prompts are those of
lm-evaluation-harness; the mathematical word problems have those of LLM-Adapters (arXiv 2304.01933).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from sqft.calibration.data import Record, check_regular, lines_of, parse_record, read_records
from sqft.errors import SqftError, UsageError, did_you_mean, shown
from sqft.limits import compiled, each, patience
from sqft.options import from_dict
from sqft.strict import plain_name, read_yaml
from sqft.tasks.base import SPLITS, Example, Task

Texts = tuple[str, str, str, tuple[tuple[str, str], ...], int]  # of an ``Example``, without its task
METRICS = ("multiple-choice", "exact-match", "number")
FILES = (".jsonl", ".jsonl.gz", ".json")
TOLERANCE = 1e-3  # of two numbers that count as equal, as in LLM-Adapters
MOST_TOKENS = 2**20
_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
_SPLIT = re.compile(r"([\w.-]+)(?:\[(-?[0-9]*):(-?[0-9]*)\])?")


@dataclass(frozen=True)
class TaskSpec:
    """A task's YAML file.

    ``splits`` maps train, validation and test to the hub's (or a slice: 'train[:-500]'), ``files`` a split of the hub
    to a local file's stem where that differs. ``prompt`` and ``completion`` are Jinja templates over a record's fields;
    ``options``, ``contexts`` and ``answer`` are Jinja expressions.

    multiple-choice: ``options`` lists the continuations (or ``contexts`` the prompts, with one ``completion``), and
    ``answer`` is the index of the right one. exact-match: ``answer`` is a text; of what was generated, what ``extract``
    finds is compared, without case and without what ``ignore`` matches. number: the last number counts.
    """

    name: str = ""
    base: str | None = None
    hub: str | None = None
    folder: str = ""
    splits: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    prompt: str = ""
    completion: str = ""
    options: str = ""
    contexts: str = ""
    answer: str = ""
    metric: str = "exact-match"
    extract: str = "(.*)"
    pick: str = "first"
    ignore: list[str] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    max_new_tokens: int = 256


@lru_cache
def shipped_specs() -> tuple[str, ...]:
    """Names of the built-in tasks that are YAML files."""
    files = resources.files("sqft.tasks").joinpath("specs").iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


def load_spec(path: Path, data_dir: str | Path | None = None) -> SpecTask:
    """The task of a YAML file. Raises UsageError naming the file, its line, and the fix."""
    return make_task(TaskSpec(**{"name": path.stem, **_read(path)}), data_dir, f"task {path}: ")


def make_task(spec: TaskSpec, data_dir: str | Path | None, where: str) -> SpecTask:
    """The task of a checked spec. Raises UsageError, beginning with ``where``."""
    if spec.metric not in METRICS:
        raise UsageError(f"{where}unknown metric '{spec.metric}': {did_you_mean(spec.metric, METRICS)}")
    if spec.pick not in ("first", "last"):
        raise UsageError(f"{where}pick is first or last (of what extract finds), not '{spec.pick}'")
    wrong = set(spec.splits) - set(SPLITS)
    if wrong or not spec.splits:
        raise UsageError(f"{where}splits map train, validation, test to where they are, e.g. {{test: validation}}")
    for pattern in (spec.extract, *spec.ignore):
        try:
            compiled(pattern)
        except ValueError as error:
            raise UsageError(f"{where}'{shown(pattern)}' is not a regular expression: {error}") from None
    if (spec.folder and not plain_name(spec.folder)) or not all(map(plain_name, (spec.name, *spec.files.values()))):
        raise UsageError(f"{where}name, folder and files are names in the data's folder, without '..' or a leading /")
    if spec.hub is not None and not _HUB.fullmatch(spec.hub):
        raise UsageError(f"{where}hub is '{shown(spec.hub)}': write owner/name or owner/name:config")
    if not 0 < spec.max_new_tokens <= MOST_TOKENS:
        raise UsageError(f"{where}max_new_tokens is {spec.max_new_tokens}: it has to lie between 1 and {MOST_TOKENS}")
    lacking = [key for key in ("folder", "answer") if not getattr(spec, key)]
    if spec.metric == "multiple-choice" and not (spec.options or spec.contexts):
        lacking.append("options")
    elif spec.metric != "multiple-choice" and not spec.prompt:
        lacking.append("prompt")
    if lacking:
        raise UsageError(f"{where}it needs '{lacking[0]}'")
    return SpecTask(**{**vars(spec), **({} if data_dir is None else {"data_dir": data_dir})})


def shipped_file(name: str) -> Path:
    return Path(str(resources.files("sqft.tasks") / "specs" / f"{name}.yaml"))


def _read(path: Path) -> dict[str, Any]:
    """The file's values, checked and of their types, over those of its ``base``."""
    values, lines = read_yaml(path)
    maps = {key: values.pop(key) for key in ("splits", "files") if key in values}
    if wrong := [key for key, value in maps.items() if not isinstance(value, dict)]:
        raise UsageError(f"{path}:{lines[wrong[0],]}: {wrong[0]} is a mapping, e.g. {{train: train}}")
    given = from_dict(TaskSpec, values, str(path), {key[0]: line for key, line in lines.items() if len(key) == 1})
    own = {key: getattr(given, key) for key in values if key != "base"}
    own |= {key: {str(split): str(name) for split, name in value.items()} for key, value in maps.items()}
    for key in own.keys() & {"stop", "ignore"}:  # as they are: flags alone part texts at commas
        own[key] = [values[key]] if isinstance(values[key], str) else [str(text) for text in values[key]]
    if given.base is None:
        return own
    if given.base not in shipped_specs():
        raise UsageError(f"task {path}: unknown base '{given.base}': {did_you_mean(given.base, shipped_specs())}")
    return {**_read(shipped_file(given.base)), "name": path.stem, **own}


@dataclass(frozen=True)
class SpecTask(TaskSpec):
    """A task that a ``TaskSpec`` defines, its data from a local folder or from the hub: never from the one when the
    other was asked for."""

    data_dir: str | Path | None = None

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """The first ``limit`` examples of a split. Raises UsageError for an unknown split, and for a record that a
        template does not fit."""
        if split not in self.splits:
            raise UsageError(f"task {self.name} has no split '{split}': it has {', '.join(self.splits)}")
        if limit is not None and limit < 0:
            raise UsageError(f"limit is {limit}: give a number >= 0")
        records = self.records(self.splits[split])
        if not records:
            raise UsageError(f"task {self.name}: its split '{split}' ({self.splits[split]}) has no examples: the data "
                             "is too short")  # fmt: skip
        made = each(self._prepare, records[:limit], f"task {self.name}: ")
        return [
            Example(start, end, answer, tuple((context, text) for context, text in options), gold, self.name)
            for start, end, answer, options, gold in made
        ]

    def _prepare(self) -> Callable[[Record], Texts]:
        make = _maker(self)

        def from_record(record: Record) -> Texts:
            try:
                return make(record)
            except (MemoryError, RecursionError):
                raise
            except Exception as error:  # a template and a record of a stranger's can raise anything
                raise UsageError(f"task {self.name}: {record.at}: the record does not fit its templates "
                                 f"({shown(error)}); it has {', '.join(record)}") from None  # fmt: skip

        return from_record

    def records(self, split: str) -> list[Record]:
        """The records of the data's 'train', say, or of a slice of it as in 'train[:-500]'.

        A local split is FOLDER/SPLIT.jsonl, .jsonl.gz, or .json (a list). Raises UsageError naming the file that is
        missing, SqftError for one that is corrupt and for a hub that does not answer.
        """
        match = _SPLIT.fullmatch(split)
        if not match:
            raise UsageError(f"task {self.name}: '{split}' is no split: write e.g. train or 'train[:-500]'")
        stem, start, stop = match.groups()
        records = self._local(stem, Path(self.data_dir)) if self.data_dir is not None else self._hub(stem)
        if start is None:
            return records
        return records[int(start) if start else None : int(stop) if stop else None]

    def _local(self, stem: str, data_dir: Path) -> list[Record]:
        if not data_dir.is_dir():
            raise UsageError(f"there is no folder {data_dir} (data_dir)")
        folder, stem = data_dir / self.folder, self.files.get(stem, stem)
        for suffix in FILES:
            path = folder / f"{stem}{suffix}"
            if path.exists():
                return _json_list(path) if suffix == ".json" else read_records(str(path))
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        has = f"{folder} has {', '.join(there)}" if there else f"there is no folder {folder}"
        raise UsageError(f"task {self.name} needs {folder / stem}.jsonl (or .jsonl.gz, .json), but {has}")

    def _hub(self, stem: str) -> list[Record]:
        if self.hub is None:
            raise UsageError(f"the data of task {self.name} is on no hub: give data_dir, a folder with "
                             f"{self.folder}/{stem}.jsonl")  # fmt: skip
        try:
            return read_records(f"{self.hub}@{stem}")
        except SqftError as error:
            raise SqftError(f"task {self.name}: {error}; or give data_dir, a folder with {self.folder}/{stem}.jsonl "
                            "(--data-dir)") from error  # fmt: skip

    def is_correct(self, generated: str, example: Example) -> bool:
        """Whether a generated text gives the example's answer. Raises UsageError for a pattern that takes too long."""
        with patience(f"task {self.name}: 'extract' or 'ignore'"):
            return self._is_correct(generated, example)

    def _is_correct(self, generated: str, example: Example) -> bool:
        if self.metric == "multiple-choice":
            return self._plain(generated) == self._plain(example.answer)
        found = find_answer(self, generated)
        if self.metric == "number":
            return found is not None and abs(float(found) - float(example.answer.replace(",", ""))) <= TOLERANCE
        return found is not None and self._plain(found) == self._plain(example.answer)

    def _plain(self, text: str) -> str:
        for pattern in self.ignore:
            text = re.sub(pattern, "", text)
        return text.lower().strip()


def _json_list(path: Path) -> list[Record]:
    check_regular(path)
    records = parse_record("".join(lines_of(path, longest=2**40)), str(path))
    if not isinstance(records, list) or not records:
        raise SqftError(f"{path} is not a list of JSON objects, or an empty one")
    if wrong := next((n for n, record in enumerate(records, 1) if not isinstance(record, dict)), None):
        raise SqftError(f"{path}, record {wrong}: not a JSON object with named fields")
    return [Record(record, f"{path}, record {number}") for number, record in enumerate(records, 1)]


def find_answer(spec: TaskSpec, generated: str) -> str | None:
    """The answer in a generated text: the first or last match (its first group that matched), or None."""
    text = generated.replace(",", "") if spec.metric == "number" else generated
    pattern, last = (r"-?[0-9]+\.?[0-9]*", True) if spec.metric == "number" else (spec.extract, spec.pick == "last")
    found = list(re.finditer(pattern, text))
    if not found:
        return None
    match = found[-1 if last else 0]
    return next((group for group in match.groups() if group), match.group()).strip()


def _maker(spec: TaskSpec) -> Callable[[dict[str, Any]], Texts]:
    """The function from a record to an example's texts, its templates compiled once."""
    environment = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = lambda text, pattern, by: re.sub(pattern, by, text)
    try:
        prompt, completion = environment.from_string(spec.prompt), environment.from_string(spec.completion)
        options, contexts, answer = (environment.compile_expression(text or "none", undefined_to_none=False)
                                     for text in (spec.options, spec.contexts, spec.answer))  # fmt: skip
    except (jinja2.TemplateError, SyntaxError, ValueError, OverflowError) as error:
        raise UsageError(f"task {spec.name}: a template is not valid Jinja: {shown(error)}") from None

    def make(record: dict[str, Any]) -> Texts:
        right = _defined(answer(record))
        if spec.metric != "multiple-choice":
            if spec.metric == "number":
                float(str(right).replace(",", ""))
            return prompt.render(record), completion.render(record), str(right), (), -1
        if spec.contexts:
            tail = completion.render(record)
            pairs = [(str(context), tail) for context in _defined(contexts(record))]
        else:
            start = prompt.render(record)
            pairs = [(start, f" {option}") for option in _defined(options(record))]
        gold = int(right)
        if not 0 <= gold < len(pairs):
            raise ValueError(f"the answer is {gold}, of {len(pairs)} options")
        text = pairs[gold][0] if spec.contexts else pairs[gold][1].strip()
        return *pairs[gold], text, tuple(pairs), gold

    return make


def _defined(value: Any) -> Any:
    if isinstance(value, jinja2.Undefined):
        str(value)  # raises, naming the field
    return value


@dataclass(frozen=True)
class UnionTask:
    """Several tasks as one: examples of all, in order; a ``limit`` is for each."""

    name: str
    parts: tuple[Task, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(split for split in SPLITS if all(split in part.splits for part in self.parts))

    @property
    def max_new_tokens(self) -> int:
        return max(part.max_new_tokens for part in self.parts)

    @property
    def stop(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text for part in self.parts for text in part.stop))

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        return [example for part in self.parts for example in part.examples(split, limit)]

    def is_correct(self, generated: str, example: Example) -> bool:
        part = next(part for part in self.parts if part.name == example.task)
        return part.is_correct(generated, example)
