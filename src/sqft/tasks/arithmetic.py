"""Grade-school word problems of the project's own: the demo's task.

Every problem is made from a template, names, things and numbers by a seeded generator, so that train, validation and
test hold the same problems on every machine. No question occurs in two splits, not even with other names. The answer
is worked step by step and ends in ``#### `` and the result, as in GSM8K.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from sqft.errors import UsageError
from sqft.tasks.base import SPLITS, Example

NAMES = (
    "Ada", "Amir", "Bea", "Ben", "Carla", "Chidi", "Dan", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jun", "Kofi",
    "Lena", "Mara", "Nils", "Olga", "Pablo", "Quinn", "Rosa", "Sami", "Tara", "Umar", "Vera", "Wen", "Yara", "Zoe",
)  # fmt: skip
# Train comes last: with another number of train problems, validation and test stay as they are.
_STREAM_ORDER = ("test", "validation", "train")
_STEP_WEIGHTS = {1: 0.50, 2: 0.35, 3: 0.15}
_LARGEST = 199  # of all results, also the intermediate ones
_PATIENCE = 2000  # duplicates in a row after which the problems are taken to be used up
_NUMBER = re.compile(r"(?:(?<![\w.])-)?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")
_THOUSANDS_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


@dataclass(frozen=True)
class _Template:
    """``operations`` are worked in order; ``_`` is the result so far. Variables not in ``ranges`` are 2 to 20."""

    text: str
    operations: str
    ranges: Mapping[str, range] = field(default_factory=dict)
    things: tuple[str, ...] = ("",)


_HELD = ("marbles", "stickers", "shells", "cards", "buttons", "stamps", "beads", "coins", "badges", "postcards")
_FRUIT = ("apples", "oranges", "pears", "plums", "peaches", "lemons", "mangoes", "apricots", "kiwis")
_BAKED = ("cookies", "muffins", "rolls", "pretzels", "scones", "cupcakes", "biscuits")
_PLANTS = ("tulips", "cabbages", "onions", "leeks", "sunflowers", "carrots", "rose bushes", "pepper plants")
_SCHOOL = ("pencils", "erasers", "crayons", "notebooks", "markers", "folders", "rulers")
_PLACES = ("zoo", "fair", "museum", "circus", "pool", "concert", "aquarium")
_FEW, _SOME, _MANY = range(2, 10), range(2, 31), range(10, 91)

_TEMPLATES = (
    # one step
    _Template("{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
              "a + b", {"a": range(2, 61), "b": _SOME}, _HELD),
    _Template("{name} has {a} {thing} and gives {b} of them to {other}. How many {thing} does {name} have left?",
              "a - b", {"a": range(5, 71), "b": _SOME}, _HELD + _FRUIT),
    _Template("{name} has {a} {thing} and {other} has {b}. How many {thing} do they have together?",
              "a + b", {"a": _SOME, "b": range(2, 61)}, _HELD + _SCHOOL),
    _Template("{name} has {a} {thing} and {other} has {b}. How many more {thing} does {name} have than {other}?",
              "a - b", {"a": range(5, 61), "b": _SOME}, _HELD + _SCHOOL),
    _Template("There are {a} baskets with {b} {thing} in each. How many {thing} are there in total?",
              "a * b", {"a": _FEW}, _FRUIT),
    _Template("{name} shares {a} {thing} equally among {b} friends. How many {thing} does each friend get?",
              "a / b", {"a": range(4, 91), "b": _FEW}, _HELD + _FRUIT),
    _Template("A bus is carrying {a} people. At the next stop {b} people get on. How many people are on the bus now?",
              "a + b", {"a": range(5, 51)}),
    _Template("A bus is carrying {a} people. At the next stop {b} people get off. How many people are still on the "
              "bus?", "a - b", {"a": range(5, 51)}),
    _Template("{name} reads {a} pages on Monday and {b} pages on Tuesday. How many pages does {name} read in total?",
              "a + b", {"a": range(5, 51), "b": range(5, 51)}),
    _Template("A book has {a} pages and {name} has read {b} of them. How many pages are left to read?",
              "a - b", {"a": range(30, 100), "b": range(3, 61)}),
    _Template("A garden has {a} rows with {b} {thing} in each row. How many {thing} grow in the garden?",
              "a * b", {"b": _FEW}, _PLANTS),
    _Template("{name} wants a game that costs {a} dollars and has saved {b} dollars. How many more dollars does {name} "
              "need?", "a - b", {"a": range(20, 96), "b": range(3, 61)}),
    _Template("{name} saves {a} dollars every week. How many dollars does {name} save in {b} weeks?",
              "a * b", {"b": _FEW}),
    _Template("{name} bakes {a} {thing} and puts them into boxes of {b}. How many boxes does {name} fill?",
              "a / b", {"a": range(6, 91), "b": _FEW}, _BAKED),
    _Template("A ticket to the {thing} costs {a} dollars. How many dollars do {b} tickets cost?",
              "a * b", {"b": _FEW}, _PLACES),
    _Template("{name} cycles {a} kilometers each day. How many kilometers does {name} cycle in {b} days?",
              "a * b", {"b": _FEW}),
    _Template("A rope is {a} meters long and {name} cuts off {b} meters. How many meters of rope are left?",
              "a - b", {"a": _MANY, "b": _SOME}),
    _Template("A class of {a} children splits into {b} equal teams. How many children are in each team?",
              "a / b", {"a": range(6, 64), "b": _FEW}),
    _Template("Each of {a} children needs {b} {thing}. How many {thing} do the children need in total?",
              "a * b", {"b": _FEW}, _SCHOOL),
    _Template("{name} is {a} years old. How old will {name} be in {b} years?", "a + b", {"a": range(4, 41)}),
    # two steps
    _Template("{name} has {a} {thing}, finds {b} more and then loses {c}. How many {thing} does {name} have now?",
              "a + b, _ - c", {"a": range(5, 61)}, _HELD),
    _Template("{name} buys {a} packs of {b} {thing} and already has {c} at home. How many {thing} does {name} have "
              "now?", "a * b, _ + c", {"a": _FEW}, _SCHOOL),
    _Template("{name} bakes {a} trays of {b} {thing}. Then the guests eat {c} of them. How many {thing} are left?",
              "a * b, _ - c", {"a": _FEW}, _BAKED),
    _Template("{name} picks {a} {thing} in the morning and {b} in the afternoon and shares them equally among {c} "
              "neighbors. How many {thing} does each neighbor get?",
              "a + b, _ / c", {"a": range(4, 46), "b": range(4, 46), "c": _FEW}, _FRUIT),
    _Template("{name} walks {a} kilometers on each of {b} days and {c} kilometers on the day after. How many "
              "kilometers does {name} walk in total?", "a * b, _ + c", {"b": _FEW}),
    _Template("A shop has {a} {thing}. It sells {b} in the morning and {c} in the afternoon. How many {thing} are "
              "left?", "a - b, _ - c", {"a": range(20, 96)}, _FRUIT + _BAKED + _SCHOOL),
    _Template("{name} earns {a} dollars an hour and works for {b} hours. Then {name} spends {c} dollars. How many "
              "dollars are left?", "a * b, _ - c", {"b": _FEW}),
    _Template("A bus is carrying {a} people. At the next stop {b} people get off and {c} people get on. How many "
              "people are on the bus now?", "a - b, _ + c", {"a": range(10, 51)}),
    _Template("{name} has {a} {thing} and {other} has {b} times as many. How many {thing} do they have together?",
              "a * b, _ + a", {"b": range(2, 7)}, _HELD),
    _Template("{name} buys {a} {thing} for {b} dollars each and pays with {c} dollars. How many dollars does {name} "
              "get back?", "a * b, c - _", {"a": _FEW, "b": _FEW, "c": range(20, 101, 10)}, _SCHOOL + _PLANTS),
    _Template("{name} has {a} {thing} and keeps {b} of them. The rest go equally into {c} boxes. How many {thing} are "
              "in each box?", "a - b, _ / c", {"a": _MANY, "c": _FEW}, _HELD),
    _Template("A group of {a} children and {b} teachers rides in {c} equally full vans. How many people are in each "
              "van?", "a + b, _ / c", {"a": range(10, 61), "b": _FEW, "c": _FEW}),
    _Template("A gardener plants {a} rows of {b} {thing}. Then rabbits eat {c} of them. How many {thing} are left?",
              "a * b, _ - c", {"b": _FEW}, _PLANTS),
    _Template("A book has {a} pages and {name} has read {b} of them. How many days does {name} need for the rest at "
              "{c} pages a day?", "a - b, _ / c", {"a": range(30, 100), "b": range(3, 61), "c": _FEW}),
    # three steps
    _Template("{name} has {a} bags with {b} {thing} in each, gives away {c} {thing} and then gets {d} more. How many "
              "{thing} does {name} have now?", "a * b, _ - c, _ + d", {"a": _FEW}, _HELD),
    _Template("{name} collects {a} {thing} on Friday and {b} on Saturday and loses {c} on the way. The rest go equally "
              "into {d} jars. How many {thing} are in each jar?",
              "a + b, _ - c, _ / d", {"a": range(5, 46), "b": range(5, 46), "d": _FEW}, _HELD),
    _Template("A farm has {a} hens that lay {b} eggs each. The farmer keeps {c} eggs and packs the rest into boxes of "
              "{d}. How many boxes does the farmer fill?", "a * b, _ - c, _ / d", {"b": _FEW, "d": _FEW}),
    _Template("{name} starts a game with {a} points, wins {b}, then loses {c} and wins {d}. How many points does "
              "{name} have at the end?", "a + b, _ - c, _ + d", {"a": range(5, 51)}),
    _Template("{name} buys {a} {thing} for {b} dollars each and a bag for {c} dollars and pays with {d} dollars. How "
              "many dollars does {name} get back?", "a * b, _ + c, d - _",
              {"a": _FEW, "b": _FEW, "c": _FEW, "d": range(20, 101, 10)}, _SCHOOL + _PLANTS),
    _Template("{name} saves {a} dollars a week for {b} weeks, gets {c} dollars from {other} and spends {d} dollars. "
              "How many dollars are left?", "a * b, _ + c, _ - d", {"b": _FEW}),
    _Template("A bus starts with {a} people. Then {b} people get on, {c} people get off and {d} people get on. How "
              "many people are on the bus now?", "a + b, _ - c, _ + d", {"a": range(5, 41)}),
    _Template("A school has {a} boxes of {b} {thing} and buys {c} more {thing}. All of them are shared equally among "
              "{d} classes. How many {thing} does each class get?",
              "a * b, _ + c, _ / d", {"a": _FEW, "d": _FEW}, _SCHOOL),
)  # fmt: skip
_BY_STEPS = {n: tuple(t for t in _TEMPLATES if t.operations.count(",") + 1 == n) for n in _STEP_WEIGHTS}


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
            nameless, example = _problem(rng, rng.choice(_BY_STEPS[steps]))
            if nameless not in seen:
                break
        else:
            raise UsageError(f"task arithmetic has no more than {len(seen)} different problems: choose smaller sizes")
        seen.add(nameless)
        yield example


def _problem(rng: random.Random, template: _Template) -> tuple[str, Example]:
    """A question without its names, and the problem."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(template.things)
    values, lines, answer = _numbers(rng, template)
    question = f"Question: {template.text}\nAnswer:"
    nameless = question.format(name="NAME", other="NAME", thing=thing, **values)
    prompt = question.format(name=name, other=other, thing=thing, **values)
    return nameless, Example(prompt, f" {' '.join(lines)}\n#### {answer}", str(answer))


def _numbers(rng: random.Random, template: _Template) -> tuple[dict[str, int], list[str], int]:
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
    """The first number after the first ``####``, else the last number of the text; None if there is none.

    Dollar signs, commas between thousands and needless zeros are dropped: "$1,200.00" is "1200".
    """
    _, mark, after = text.partition("####")
    found = _NUMBER.findall(_THOUSANDS_COMMA.sub("", (after if mark else text).replace("$", "")))
    if not found:
        return None
    number = found[0] if mark else found[-1]
    whole, _, fraction = number.lstrip("-").partition(".")
    # As text, not as float: a model may well write a number of hundreds of digits.
    plain = (whole.lstrip("0") or "0") + f".{fraction.rstrip('0')}".rstrip(".")
    return plain if plain == "0" or not number.startswith("-") else f"-{plain}"
