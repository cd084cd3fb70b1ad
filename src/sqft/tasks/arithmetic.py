"""Grade-school word problems of the project's own: the demo's task.

Every problem is made from a template, names, things and numbers by a seeded generator, so that train, validation and
test hold different problems on every machine alike: no question occurs in two splits, not even with another name.
The answer is worked step by step and ends in ``#### `` and the result, as in GSM8K.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache

from sqft.errors import UsageError
from sqft.tasks.base import Example

NAMES = (
    "Ada", "Ben", "Carla", "Dan", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jun", "Kofi", "Lena", "Mara", "Nils",
    "Olga", "Pablo", "Quinn", "Rosa", "Sami", "Tara", "Umar", "Vera", "Wen", "Yara", "Zoe", "Amir", "Bea", "Chidi",
)  # fmt: skip
THINGS = (
    "apples", "marbles", "stickers", "pencils", "shells", "cards", "buttons", "stamps", "beads", "coins", "balloons",
    "cookies", "flowers", "books", "photos", "stones", "tickets", "eggs", "oranges", "crayons",
)  # fmt: skip

# (number of steps is the number of operations) text with {name}, {thing} and variables | operations, "_" is the
# result so far | variables with their ranges; unnamed variables are drawn from 2 to 20.
_TEMPLATES = (
    ("{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", "a + b", {"a": (2, 60)}),
    ("{name} had {a} {thing} and gave away {b}. How many {thing} are left?", "a - b", {"a": (5, 70)}),
    ("There are {a} boxes with {b} {thing} in each. How many {thing} are there in total?", "a * b", {"a": (2, 9)}),
    ("{name} shares {a} {thing} equally among {b} friends. How many {thing} does each friend get?", "a / b",
     {"a": (4, 90), "b": (2, 9)}),
    ("A bus carries {a} people. At a stop {b} people get on. How many people are on the bus?", "a + b", {"a": (5, 50)}),
    ("{name} read {a} pages on Monday and {b} pages on Tuesday. How many pages did {name} read?", "a + b",
     {"a": (5, 60), "b": (5, 60)}),
    ("A garden has {a} rows with {b} {thing} in each row. How many {thing} are in the garden?", "a * b", {"b": (2, 9)}),
    ("{name} wants to save {a} dollars and has saved {b} dollars. How many dollars are missing?", "a - b",
     {"a": (20, 95), "b": (3, 60)}),
    ("{name} packs {a} {thing} into bags of {b}. How many bags does {name} fill?", "a / b",
     {"a": (6, 90), "b": (2, 9)}),
    ("One ticket to the fair costs {a} dollars. How much do {b} tickets cost in dollars?", "a * b", {"b": (2, 9)}),
    ("{name} has {a} {thing}, gets {b} more and then loses {c}. How many {thing} does {name} have now?",
     "a + b, _ - c", {"a": (5, 60)}),
    ("{name} buys {a} packs of {b} {thing} and already had {c}. How many {thing} does {name} have?", "a * b, _ + c",
     {"a": (2, 9)}),
    ("{name} bakes {a} trays of {b} cookies and eats {c} cookies. How many cookies are left?", "a * b, _ - c",
     {"a": (2, 9)}),
    ("{name} had {a} {thing}, found {b} more and shared them all equally among {c} friends. "
     "How many {thing} did each friend get?", "a + b, _ / c", {"a": (4, 60), "c": (2, 9)}),
    ("{name} walks {a} kilometers on each of {b} days and then {c} kilometers more. "
     "How many kilometers does {name} walk?", "a * b, _ + c", {"b": (2, 9)}),
    ("A shop had {a} {thing}. It sold {b} in the morning and {c} in the afternoon. How many {thing} are left?",
     "a - b, _ - c", {"a": (20, 95)}),
    ("A class of {a} children and {b} teachers rides in {c} equal groups. How many people are in each group?",
     "a + b, _ / c", {"a": (10, 60), "b": (2, 9), "c": (2, 9)}),
    ("{name} earns {a} dollars an hour for {b} hours and spends {c} dollars on lunch. How many dollars are left?",
     "a * b, _ - c", {"b": (2, 9)}),
    ("{name} has {a} bags with {b} {thing} each, gives away {c} and then gets {d} more. "
     "How many {thing} does {name} have now?", "a * b, _ - c, _ + d", {"a": (2, 9)}),
    ("{name} collects {a} {thing} on Friday and {b} on Saturday, loses {c}, and splits the rest equally into "
     "{d} jars. How many {thing} are in each jar?", "a + b, _ - c, _ / d", {"a": (5, 50), "d": (2, 9)}),
    ("A farm has {a} hens that lay {b} eggs each. The farmer keeps {c} eggs and packs the rest into boxes of {d}. "
     "How many boxes are there?", "a * b, _ - c, _ / d", {"b": (2, 9), "d": (2, 9)}),
    ("{name} starts with {a} points, wins {b}, loses {c} and wins {d}. How many points does {name} have at the end?",
     "a + b, _ - c, _ + d", {"a": (5, 50)}),
)  # fmt: skip
_BY_STEPS = {n: [t for t in _TEMPLATES if t[1].count(",") + 1 == n] for n in (1, 2, 3)}
_STEP_WEIGHTS = {1: 0.5, 2: 0.35, 3: 0.15}
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class ArithmeticTask:
    """``seed`` and ``sizes`` (of train, validation and test) determine all problems."""

    seed: int = 0
    sizes: tuple[int, int, int] = (4000, 500, 1000)
    name: str = "arithmetic"
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ("\nQuestion:", "\n\n")

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """The first ``limit`` problems of a split. Raises UsageError for an unknown split."""
        if split not in SPLITS:
            raise UsageError(f"task arithmetic has no split '{split}': known are {', '.join(SPLITS)}")
        return list(generate_splits(self.seed, self.sizes)[split][:limit])

    def is_correct(self, generated: str, example: Example) -> bool:
        return extract_answer(generated) == example.answer


@lru_cache(maxsize=4)
def generate_splits(seed: int, sizes: tuple[int, int, int]) -> dict[str, tuple[Example, ...]]:
    """All splits. One stream of problems, unique also without their names, is cut into the three."""
    rng = random.Random(seed)
    seen: set[str] = set()
    problems: list[Example] = []
    while len(problems) < sum(sizes):
        nameless, example = _problem(rng)
        if nameless not in seen:
            seen.add(nameless)
            problems.append(example)
    train, validation, _ = sizes
    # The last two first: changing the size of train leaves the test problems as they are.
    rest = sum(sizes) - train
    return {
        "validation": tuple(problems[:validation]),
        "test": tuple(problems[validation:rest]),
        "train": tuple(problems[rest:]),
    }


def _problem(rng: random.Random) -> tuple[str, Example]:
    """A problem's text without its name, and the problem."""
    steps = rng.choices(list(_STEP_WEIGHTS), list(_STEP_WEIGHTS.values()))[0]
    text, operations, ranges = rng.choice(_BY_STEPS[steps])
    thing, name = rng.choice(THINGS), rng.choice(NAMES)
    while True:
        values = {v: rng.randint(*ranges.get(v, (2, 20))) for v in "abcd" if f"{{{v}}}" in text}
        worked = _work(operations, values)
        if worked is not None:
            break
    lines, answer = worked
    prompt = "Question: " + text + "\nAnswer:"
    nameless = prompt.format(name="NAME", thing=thing, **values)
    completion = f" {' '.join(lines)}\n#### {answer}"
    return nameless, Example(prompt.format(name=name, thing=thing, **values), completion, str(answer))


def _work(operations: str, values: dict[str, int]) -> tuple[list[str], int] | None:
    """The worked steps and the result; None if a step is not a whole number from 1 to 199."""
    lines, result = [], 0
    for operation in operations.split(", "):
        left_name, sign, right_name = operation.split()
        left = result if left_name == "_" else values[left_name]
        right = values[right_name]
        if sign == "/" and left % right:
            return None
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
        if not 1 <= result <= 199:
            return None
        lines.append(f"{left} {sign} {right} = {result}.")
    return lines, result


def extract_answer(text: str) -> str | None:
    """The number after the first ``####``, else the last number of the text; None if there is none.

    Commas, a dollar sign and a decimal part of zeros are dropped: "$1,200.00" is "1200".
    """
    marked = text.split("####", 1)
    found = _NUMBER.findall(marked[1])[:1] if len(marked) == 2 else _NUMBER.findall(text)[-1:]
    if not found:
        return None
    number = float(found[0].replace(",", "").replace("$", ""))
    return str(int(number)) if number == int(number) else str(number)
