"""Grade-school word problems of the project's own: the demo's task.

Every problem is made from a template, names, things and numbers by a seeded generator, so that train, validation and
test hold the same problems on every machine. No question occurs in two splits, not even with other names. The answer
is worked step by step and ends in ``#### `` and the result, as in GSM8K.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from itertools import islice
from typing import NamedTuple

import yaml

from sqft.errors import UsageError
from sqft.tasks.base import SPLITS, Example

# Train comes last: with another number of train problems, validation and test stay as they are.
_STREAM_ORDER = ("test", "validation", "train")
_STEP_WEIGHTS = {1: 0.50, 2: 0.35, 3: 0.15}
_LARGEST = 199  # of all results, also the intermediate ones
_PATIENCE = 2000  # duplicates in a row after which the problems are taken to be used up
_NUMBER = re.compile(r"(?:(?<![\w.])-)?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")
_THOUSANDS_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


class Template(NamedTuple):
    """``operations`` are worked in order; ``_`` is the result so far. Variables not in ``ranges`` are 2 to 20."""

    text: str
    operations: str
    ranges: Mapping[str, range]
    things: Sequence[str]


class Tables(NamedTuple):
    """What problems are made from: names, and templates by their number of steps."""

    names: Sequence[str]
    by_steps: Mapping[int, Sequence[Template]]


@lru_cache
def tables() -> Tables:
    """Those of ``arithmetic.yaml``, in its order."""
    values = yaml.safe_load((resources.files("sqft.tasks") / "arithmetic.yaml").read_text(encoding="utf-8"))
    by_steps: dict[int, list[Template]] = {steps: [] for steps in _STEP_WEIGHTS}
    for entry in values["templates"]:
        ranges = {v: range(low, high + 1, *step) for v, (low, high, *step) in entry.get("ranges", {}).items()}
        things = [thing for group in entry.get("things", ()) for thing in values["things"][group]] or [""]
        template = Template(entry["text"], entry["operations"], ranges, things)
        by_steps[template.operations.count(",") + 1].append(template)
    return Tables(values["names"], by_steps)


@dataclass(frozen=True)
class ArithmeticTask:
    """``seed`` and ``sizes`` (problems in each split) determine all problems."""

    seed: int = 0
    sizes: Mapping[str, int] = field(
        default_factory=lambda: {"train": 4000, "validation": 500, "test": 1000}, hash=False
    )
    name: str = "arithmetic"
    splits: tuple[str, ...] = SPLITS
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ("\nQuestion:", "\n\n")

    def __post_init__(self) -> None:
        if set(self.sizes) != set(SPLITS) or min(self.sizes.values()) < 0:
            raise UsageError(f"sizes of task arithmetic are {dict(self.sizes)}: give {', '.join(SPLITS)}, each >= 0")

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """The first ``limit`` problems of a split. Raises UsageError (a SqftError) for an unknown split."""
        if split not in SPLITS:
            raise UsageError(f"task arithmetic has no split '{split}': known are {', '.join(SPLITS)}")
        if limit is not None and limit < 0:
            raise UsageError(f"limit is {limit}: give a number >= 0")
        first = sum(self.sizes[s] for s in _STREAM_ORDER[: _STREAM_ORDER.index(split)])
        size = self.sizes[split] if limit is None else min(limit, self.sizes[split])
        return list(islice(_stream(self.seed), first, first + size))

    def is_correct(self, generated: str, example: Example) -> bool:
        return extract_answer(generated) == example.answer


ARITHMETIC = ArithmeticTask()


def _stream(seed: int) -> Iterator[Example]:
    """Problems without end, unique even without their names. Raises UsageError when no new ones are found."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        steps = rng.choices(list(_STEP_WEIGHTS), list(_STEP_WEIGHTS.values()))[0]
        for _ in range(_PATIENCE):  # a duplicate is replaced by a problem with as many steps
            nameless, example = _problem(rng, rng.choice(tables().by_steps[steps]))
            if nameless not in seen:
                break
        else:
            raise UsageError(f"task arithmetic has no more than {len(seen)} different problems: choose smaller sizes")
        seen.add(nameless)
        yield example


def _problem(rng: random.Random, template: Template) -> tuple[str, Example]:
    """A question without its names, and the problem."""
    name, other = rng.sample(tables().names, 2)
    thing = rng.choice(template.things)
    values, lines, answer = _numbers(rng, template)
    question = f"Question: {template.text}\nAnswer:"
    nameless = question.format(name="NAME", other="NAME", thing=thing, **values)
    prompt = question.format(name=name, other=other, thing=thing, **values)
    return nameless, Example(prompt, f" {' '.join(lines)}\n#### {answer}", str(answer))


def _numbers(rng: random.Random, template: Template) -> tuple[dict[str, int], list[str], int]:
    """The variables' values, the worked steps and the answer."""
    variables = [v for v in "abcd" if f"{{{v}}}" in template.text]
    ranges = {v: template.ranges.get(v, range(2, 21)) for v in variables}
    # Divisors are drawn once: drawn again with the rest, the small ones, which divide more, would win.
    divisors = {v: rng.choice(ranges[v]) for v in variables if f"/ {v}" in template.operations}
    while True:
        values = {v: divisors[v] if v in divisors else rng.choice(ranges[v]) for v in variables}
        worked = _work(template.operations, values)
        if worked is not None:
            return values, *worked


def _work(operations: str, values: Mapping[str, int]) -> tuple[list[str], int] | None:
    """The worked steps and the result; None if a step's result is not a whole number from 1 to ``_LARGEST``."""
    lines: list[str] = []
    result = 0
    for operation in operations.split(", "):
        left_name, sign, right_name = operation.split()
        left, right = (result if v == "_" else values[v] for v in (left_name, right_name))
        if sign == "/" and left % right:
            return None
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
        if not 1 <= result <= _LARGEST:
            return None
        lines.append(f"{left} {sign} {right} = {result}.")
    return lines, result


def extract_answer(text: str) -> str | None:
    """The first number after the first ``####``, else the last number of the text; None if there is none. Dollar signs,
    commas between thousands and needless zeros are dropped: "$1,200.00" is "1200"."""
    _, mark, after = text.partition("####")
    found = _NUMBER.findall(_THOUSANDS_COMMA.sub("", (after if mark else text).replace("$", "")))
    if not found:
        return None
    number = found[0] if mark else found[-1]
    whole, _, fraction = number.lstrip("-").partition(".")
    # As text, not as float: a model may well write a number of hundreds of digits.
    plain = (whole.lstrip("0") or "0") + f".{fraction.rstrip('0')}".rstrip(".")
    return plain if plain == "0" or not number.startswith("-") else f"-{plain}"
