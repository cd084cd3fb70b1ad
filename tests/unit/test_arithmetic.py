from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sqft
from sqft.tasks.arithmetic import NAMES, SPLITS, ArithmeticTask, extract_answer

TASK = ArithmeticTask()


def test_every_solution_is_right_and_chains_to_the_answer() -> None:
    for split in SPLITS:
        for example in TASK.examples(split):
            steps, _, answer = example.completion.partition("\n#### ")
            results = []
            for left, sign, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", steps):
                exact = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right),
                         "/": int(left) / int(right)}[sign]  # fmt: skip
                assert exact == int(result)
                assert not results or int(left) == results[-1]
                results.append(int(result))
            assert answer == example.answer == str(results[-1])
            assert TASK.is_correct(example.completion, example)
            assert not TASK.is_correct(f" #### {int(answer) + 1}", example)


def test_splits_share_no_problem_not_even_with_another_name() -> None:
    seen: dict[str, str] = {}
    for split in SPLITS:
        for example in TASK.examples(split):
            nameless = re.sub("|".join(rf"\b{name}\b" for name in NAMES), "NAME", example.prompt)
            assert nameless not in seen, (split, seen[nameless])
            seen[nameless] = split
    assert len(seen) == sum(TASK.sizes)


def test_seed_decides_and_limit_takes_the_first() -> None:
    assert TASK.examples("test") == ArithmeticTask().examples("test")
    assert TASK.examples("test") != ArithmeticTask(seed=1).examples("test")
    assert TASK.examples("train", 7) == TASK.examples("train")[:7]
    assert ArithmeticTask(sizes=(10, 500, 1000)).examples("test") == TASK.examples("test")


def test_mix_of_steps_and_texts() -> None:
    examples = TASK.examples("train")
    steps = [example.completion.count("=") for example in examples]
    for count, expected in ((1, 0.5), (2, 0.35), (3, 0.15)):
        assert abs(steps.count(count) / len(steps) - expected) < 0.06
    templates = {re.sub(r"\d+", "#", re.sub("|".join(NAMES), "N", e.prompt)) for e in examples}
    assert len(templates) > 100
    assert max(len((e.prompt + e.completion).split()) for e in examples) < 75


def test_unknown_split() -> None:
    with pytest.raises(sqft.UsageError, match="no split 'dev': known are train, validation, test"):
        TASK.examples("dev")


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" 3 + 4 = 7.\n#### 7", "7"), ("#### $1,200.00 and 5", "1200"), ("first 3, then 5.", "5"), ("nothing", None),
     ("#### -4", "-4"), ("it is 2.5", "2.5"), ("#### none, but 3 before", "3"), ("12 #### x", None)],
)  # fmt: skip
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@given(st.integers(-(10**9), 10**9))
def test_extract_answer_reads_every_integer(number: int) -> None:
    assert extract_answer(f"so #### {number}.") == extract_answer(f"so #### {number:,}") == str(number)
