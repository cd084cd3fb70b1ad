from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqft.errors import SqftError, UsageError
from sqft.tasks.arithmetic import SPLITS, ArithmeticTask, extract_answer, tables
from sqft.tasks.base import Example

TASK = ArithmeticTask()
SMALL = {"train": 30, "validation": 10, "test": 20}
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")
NAME = re.compile(rf"\b(?:{'|'.join(tables().names)})\b")


def everything(task: ArithmeticTask) -> list[Example]:
    return [example for split in SPLITS for example in task.examples(split)]


def check_worked(task: ArithmeticTask, example: Example) -> int:
    """Works the completion with a parser of its own; the number of steps."""
    worked, answer = re.fullmatch(r" ([^\n]+)\n#### (\d+)", example.completion).groups()  # type: ignore[union-attr]
    steps = STEP.findall(worked)
    assert " ".join(f"{a} {sign} {b} = {c}." for a, sign, b, c in steps) == worked
    previous, given_numbers = None, set(map(int, re.findall(r"\d+", example.prompt)))
    for left, sign, right, result in ((int(a), sign, int(b), int(c)) for a, sign, b, c in steps):
        if sign == "/":
            assert left == right * result
        else:
            assert {"+": left + right, "-": left - right, "*": left * right}[sign] == result
        assert 0 <= result < 1000
        if previous is not None:
            assert previous in (left, right)
        assert {left, right} - {previous} <= given_numbers
        previous = result
    assert answer == example.answer == str(previous)
    assert task.is_correct(example.completion, example)
    assert not task.is_correct(f" #### {int(answer) + 1}", example)
    assert not task.is_correct(" I do not know", example)
    return len(steps)


def test_every_solution_is_right_uses_the_given_numbers_and_chains_to_the_answer() -> None:
    for example in everything(TASK):
        assert 1 <= check_worked(TASK, example) <= 3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**64))
def test_other_seeds_hold_too(seed: int) -> None:
    task = ArithmeticTask(seed, SMALL)
    examples = everything(task)
    assert [len(task.examples(split)) for split in SPLITS] == [SMALL[split] for split in SPLITS]
    assert len({NAME.sub("NAME", example.prompt) for example in examples}) == len(examples)
    for example in examples:
        check_worked(task, example)


def test_splits_share_no_problem_not_even_with_other_names() -> None:
    examples = everything(TASK)
    assert len(examples) == 5500
    assert len({example.prompt for example in examples}) == 5500
    assert len({NAME.sub("NAME", example.prompt) for example in examples}) == 5500


def test_seed_decides() -> None:
    assert everything(TASK) == everything(ArithmeticTask())
    ours = {example.prompt for example in TASK.examples("test")}
    others = {example.prompt for example in ArithmeticTask(seed=1).examples("test")}
    assert len(ours & others) < 0.2 * len(ours)


def test_another_process_makes_the_same_problems() -> None:
    code = "from sqft.tasks.arithmetic import ArithmeticTask as T; print(T().examples('train', 3)[2].prompt)"
    for hash_seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.rstrip("\n") == TASK.examples("train")[2].prompt


def test_limit_takes_the_first_and_the_size_of_train_moves_no_test_problem() -> None:
    for split in SPLITS:
        every = TASK.examples(split)
        assert TASK.examples(split, 7) == every[:7]
        assert TASK.examples(split, 10**6) == every
        assert TASK.examples(split, 0) == []
    fewer = ArithmeticTask(sizes={"train": 10, "validation": 500, "test": 1000})
    assert fewer.examples("test") == TASK.examples("test")
    assert fewer.examples("validation") == TASK.examples("validation")


@pytest.mark.parametrize("split", SPLITS)
def test_mix_of_steps_templates_and_operations(split: str) -> None:
    examples = TASK.examples(split)
    steps = Counter(len(STEP.findall(example.completion)) for example in examples)
    for count, expected in ((1, 0.50), (2, 0.35), (3, 0.15)):
        assert abs(steps[count] / len(examples) - expected) < 0.06
    signs = Counter(sign for example in examples for _, sign, _, _ in STEP.findall(example.completion))
    assert min(signs[sign] for sign in "+-*/") > 0.1 * len(examples)
    # The first words tell the situations apart, at least twelve of them.
    first_words = {" ".join(re.sub(r"\d+", "#", NAME.sub("NAME", e.prompt)).split()[:4]) for e in examples}
    assert len(first_words) >= 12


def test_texts_are_short_and_well_formed() -> None:
    examples = everything(TASK)
    lengths = [len((example.prompt + example.completion).split()) for example in examples]
    assert max(lengths) <= 75 and sum(lengths) / len(lengths) <= 40
    for example in examples:
        question = re.fullmatch(r"Question: ([A-Z].+\?)\nAnswer:", example.prompt)
        assert question, example.prompt
        assert 1 <= len(re.findall(r"[.?](?: |$)", question[1])) <= 3
        assert not re.search(r"[{}_]|  |\b(?:he|she|his|her|him|NAME)\b|\b[01] [a-z]", question[1]), example.prompt
        assert not any(stop in example.completion for stop in TASK.stop)
        names = NAME.findall(question[1])
        assert len(set(names)) <= 2 and (len(names) < 2 or names[0] in names[1:] or len(set(names)) == 2)
    assert len(set(tables().names)) == len(tables().names) >= 24
    assert {name for example in examples for name in NAME.findall(example.prompt)} == set(tables().names)


def test_unknown_split_and_bad_sizes() -> None:
    with pytest.raises(SqftError, match="no split 'dev': known are train, validation, test"):
        TASK.examples("dev")
    with pytest.raises(UsageError, match="limit is -1"):
        TASK.examples("test", -1)
    with pytest.raises(UsageError, match="give train, validation, test"):
        ArithmeticTask(sizes={"train": 5})
    with pytest.raises(UsageError, match="each >= 0"):
        ArithmeticTask(sizes=SMALL | {"test": -1})


def test_too_large_sizes_end_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqft.tasks.arithmetic._PATIENCE", 1)
    with pytest.raises(UsageError, match="choose smaller sizes"):
        TASK.examples("train")


def test_all_splits_take_less_than_a_second() -> None:
    before = time.process_time()
    everything(TASK)
    assert time.process_time() - before < 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 3 + 4 = 7.\n#### 7", "7"), ("#### $1,200.00 and 5", "1200"), ("#### 15.0", "15"), ("#### 1,200.", "1200"),
        ("#### 4\n#### 5", "4"), ("#### none, but 3 before", "3"), ("12 #### x", None), ("####", None),
        ("first 3, then 5.", "5"), ("so it is $1,234,567.", "1234567"), ("1, 2,3", "3"), ("nothing", None), ("", None),
        ("#### -4", "-4"), ("#### -$4", "-4"), ("#### $-4", "-4"), ("20 - 4", "4"), ("20-4", "4"), ("#### -0", "0"),
        ("it is 2.50", "2.5"), ("it is .5", "0.5"), ("#### 007", "7"), ("9" * 5000, "9" * 5000), ("#### 12 apples", "12"),
        ("#### **18**", "18"), ("####18", "18"),
    ],
)  # fmt: skip
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@given(st.integers(-(10**20), 10**20), st.text(alphabet="abc #\n$:=", max_size=10))
def test_extract_answer_reads_every_integer(number: int, before: str) -> None:
    for written in (f"{number}", f"{number:,}", f"{number}.", f"{number}.00"):
        assert extract_answer(f"{before} {written}") == str(number)
        assert extract_answer(f"5 #### {written} 6") == str(number)


@given(st.text(alphabet="0123456789.,-$# ab\n"))
def test_extract_answer_takes_any_text(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or re.fullmatch(r"-?\d+(?:\.\d+)?", answer)
