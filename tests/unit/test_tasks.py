"""Tasks made from records: prompts, options, answers, splits, where data comes from, and what goes wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

import sqft
from sqft.config import TrainConfig
from sqft.evaluation.scoring import summarize
from sqft.registry import TASKS
from sqft.tasks.arithmetic import ArithmeticTask
from sqft.tasks.base import Example, same_problem, without_duplicates
from sqft.tasks.lookup import UNIONS, get_task
from sqft.tasks.spec import shipped_specs
from sqft.training.data import load_examples

ARC = {
    "question": "What is hot?",
    "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
RECORDS = {
    "arc_easy": (ARC, ("Question: What is hot?\nAnswer:", " fire"), 1),
    "arc_challenge": (ARC, ("Question: What is hot?\nAnswer:", " fire"), 1),
    "openbookqa": ({"question_stem": "Hot is", "choices": ARC["choices"], "answerKey": " B"}, ("Hot is", " fire"), 1),
    "piqa": ({"goal": "Boil water", "sol1": "heat it", "sol2": "freeze it", "label": 0}, ("Question: Boil water\nAnswer:", " heat it"), 0),
    "boolq": ({"passage": "Fire is hot.", "question": "is fire hot", "answer": True}, ("Fire is hot.\nQuestion: is fire hot?\nAnswer:", " yes"), 1),
    "hellaswag": (
        {"activity_label": "Roof", "ctx_a": "A man [step] sits [title] here.", "ctx_b": "he", "endings": ["x [substeps] y", " stands up."], "label": "1"},
        ("Roof: A man sits. here. He", " stands up."), 1),
    "winogrande": (
        {"sentence": "Ian hit Dennis because _ was rude.", "option1": "Ian", "option2": "Dennis", "answer": "2"},
        ("Ian hit Dennis because Dennis", " was rude."), 1),
}  # fmt: skip
MATH = {
    "addsub": {"instruction": " 7 minus 3? ", "output": "wrong", "answer": "4"},
    "singleeq": {"instruction": " 7 minus 3? ", "output": "wrong", "answer": "4.0"},
    "svamp": {"Body": "7 minus", "Question": "3?", "Answer": 4.0},
    "gsm8k_instruct": {"question": "7 minus 3?", "answer": "7 - 3 = 4\n#### 4"},
    "mawps": {"original_text": "7 minus 3?", "equation": "X=(7.0-3.0)", "ans": 4.0},
}
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n7 minus 3?\n\n### Response:\n")  # fmt: skip


def write(path: Path, records: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_split(folder: Path, task: str, split: str, records: list) -> None:
    """As the task's file names it."""
    spec = get_task(task, folder)
    stem = spec.splits[split].split("[")[0]
    write(folder / spec.folder / f"{spec.files.get(stem, stem)}.jsonl", records)


@pytest.mark.parametrize("name", RECORDS)
def test_multiple_choice_from_a_record(name: str, tmp_path: Path) -> None:
    record, right, gold = RECORDS[name]
    write_split(tmp_path, name, "test", [record, record])
    examples = get_task(name, tmp_path).examples("test")
    assert len(examples) == 2 and examples[0] == examples[1]
    example = examples[0]
    assert (example.prompt, example.completion) == right == example.options[example.gold]
    assert example.gold == gold and example.task == name
    if name == "hellaswag":  # a run of brackets leaves one blank
        assert example.options[0][1] == " x y"


@pytest.mark.parametrize("name", MATH)
def test_word_problems_as_instructions(name: str, tmp_path: Path) -> None:
    write_split(tmp_path, name, "test", [MATH[name]])
    task = get_task(name, tmp_path)
    (example,) = task.examples("test")
    assert example.prompt == ALPACA and not example.options and "wrong" not in example.completion
    for text, right in (
        ("It is 7 - 3 = 4.", True),
        ("4, no: 5", False),
        ("none", False),
        ("4.0005", True),
        ("1,004", False),
    ):
        assert task.is_correct(text, example) == right, text


def test_gsm8k_takes_what_follows_the_hashes(tmp_path: Path) -> None:
    write_split(tmp_path, "gsm8k", "test", [{"question": "How many?", "answer": "6 * 200 = 1,200\n#### 1,200"}])
    task = get_task("gsm8k", tmp_path)
    (example,) = task.examples("test")
    assert example == Example("Question: How many?\nAnswer:", " 6 * 200 = 1,200\n#### 1,200", "1,200", task="gsm8k")
    for text, right in (
        ("#### 1200", True),
        ("#### 1,200.", True),
        ("#### 1200\n#### 5", True),
        ("1200", False),
        ("#### 5 #### 1200", False),
    ):
        assert task.is_correct(text, example) == right, text


def test_aqua_takes_the_first_letter(tmp_path: Path) -> None:
    write_split(tmp_path, "aqua", "test", [{"instruction": "Which? (A) 1 (B) 2", "answer": "B"}])
    task = get_task("aqua", tmp_path)
    (example,) = task.examples("test")
    assert task.is_correct("the answer is (B), not A", example) and not task.is_correct("A or B", example)


def test_a_slice_of_train_is_held_out(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(300)]
    write(tmp_path / "gsm8k" / "train.jsonl.gz", rows)
    task = get_task("gsm8k", tmp_path)
    train, validation = task.examples("train"), task.examples("validation", 3)
    assert [e.answer for e in train] == [str(i) for i in range(44)]
    assert [e.answer for e in validation] == ["44", "45", "46"]
    assert len(without_duplicates(validation, train)) == 3


def test_too_little_data_and_a_limit_of_none_at_all_are_said(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "train.jsonl", [{"question": "1?", "answer": "#### 1"}] * 3)
    with pytest.raises(sqft.UsageError, match="split 'train' .* has no examples"):
        get_task("gsm8k", tmp_path).examples("train")
    for config in (sqft.EvaluateConfig, sqft.SearchConfig, sqft.TrainConfig):
        with pytest.raises(sqft.UsageError, match="limit is 0"):
            config(task="gsm8k", limit=0)


def test_math_10k_from_a_json_list(tmp_path: Path) -> None:
    (tmp_path / "llm_adapters" / "math_10k").mkdir(parents=True)
    rows = [{"instruction": f"{i}?", "input": "", "output": f"It is {i}.", "answer": str(i)} for i in range(130)]
    (tmp_path / "llm_adapters" / "math_10k" / "train.json").write_text(json.dumps(rows))
    examples = get_task("math_10k", tmp_path).examples("train")
    assert len(examples) == 10 and examples[3].completion == "It is 3."


def test_several_tasks_as_one(tmp_path: Path) -> None:
    for name in ("arc_easy", "boolq"):
        write_split(tmp_path, name, "test", [RECORDS[name][0]] * 3)
    task = get_task("arc_easy+boolq", tmp_path)
    assert [e.task for e in task.examples("test", 2)] == ["arc_easy", "arc_easy", "boolq", "boolq"]
    assert set(UNIONS["commonsense"].split("+")) == set(RECORDS)
    records = [
        {"task": t, "correct": c} for t, c in (("a", True), ("a", True), ("a", False), ("a", False), ("b", True))
    ]
    metrics = summarize(records)
    assert metrics["accuracy"] == 0.75 and metrics["tasks"]["a"]["accuracy"] == 0.5 and metrics["problems"] == 5


def test_training_leaves_out_what_is_evaluated(tmp_path: Path) -> None:
    def arc(i: int) -> dict:
        return {**ARC, "question": f"Number {i}?"}

    for split, numbers in (("train", range(10)), ("validation", (3, 20)), ("test", (4, 21))):
        write_split(tmp_path, "arc_easy", split, [arc(i) for i in numbers])
    loaded = load_examples(TrainConfig(task="arc_easy", data_dir=str(tmp_path), limit=6))
    assert [e.prompt.split()[2] for e in loaded.examples] == ["0?", "1?", "2?", "5?", "6?", "7?"]
    assert loaded.notes == {"duplicates_left_out": 2} and len(loaded.evaluation) == 2
    (tmp_path / "arc_easy" / "test.jsonl").unlink()  # what is not here is said
    notes = load_examples(TrainConfig(task="arc_easy", data_dir=str(tmp_path))).notes
    assert notes["duplicates_left_out"] == 1 and "test.jsonl" in notes["test_split_not_checked"]


def test_the_same_problem_in_other_clothes() -> None:
    one = Example("Q: a?", " x", options=(("Q: a?", " x"), ("Q: a?", " y")), gold=0)
    other = Example("q:  A?", " x", options=(("q:  A?", " y"), ("q:  A?", " x")), gold=1)
    assert same_problem(one) == same_problem(other) != same_problem(Example("Q: a?", " x"))


CUSTOM = """
hub: someone/capitals
folder: capitals
splits: {train: train, validation: "train[:1]", test: test}
prompt: "{{country}}'s capital is"
completion: " {{capital}}."
answer: capital
metric: exact-match
extract: "^\\\\s*(\\\\w+)"
stop: ["."]
max_new_tokens: 8
"""


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "capitals.yaml"
    file.write_text(CUSTOM)
    write(tmp_path / "capitals" / "test.jsonl", [{"country": "France", "capital": "Paris"}])
    task = get_task(str(file), tmp_path)
    assert task.examples("test") == [Example("France's capital is", " Paris.", "Paris", task="capitals")]
    assert task.is_correct(" paris is it", task.examples("test")[0]) and task.max_new_tokens == 8 and task.stop == ["."]
    child = tmp_path / "half.yaml"  # another split of a task that there is
    child.write_text("base: boolq\nfiles: {train: train_subset}\n")
    write(tmp_path / "boolq" / "train_subset.jsonl", [RECORDS["boolq"][0]] * 501)
    assert len(get_task(str(child), tmp_path).examples("train")) == 1 and get_task(str(child)).name == "half"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("metric: exact-match", "metric: f1"), "unknown metric 'f1'"),
        (("answer: capital", ""), "it needs 'answer'"),
        (('prompt: "{{country}}', 'prompt: "{{land}}'), "1: the record does not fit its templates ('land' is undefined); it has country, capital"),
        (("answer: capital", 'answer: "(("'), "not valid Jinja"),
        (("hub: someone", "hbu: someone"), "unknown option 'hbu'"),
        (("splits: {train: train", "splits: {trian: train"), "splits map train, validation, test"),
        (("splits: {train: train", 'splits: {train: "train[1]"'), "is no split"),
        (("max_new_tokens: 8", 'ignore: ["("]'), "'(' is not a regular expression"),
        (("metric: exact-match", "metric: multiple-choice"), "it needs 'options'"),
        (("answer: capital", "answer: \"''.__class__.__mro__\""), "1: the record"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_task_is_said(change: tuple[str, str], says: str, tmp_path: Path) -> None:
    file = tmp_path / "capitals.yaml"
    assert change[0] in CUSTOM
    file.write_text(CUSTOM.replace(*change))
    for split in ("train", "test"):
        write(tmp_path / "capitals" / f"{split}.jsonl", [{"country": "France", "capital": "Paris"}])
    with pytest.raises(sqft.UsageError) as caught:
        for split in ("test", "train"):
            get_task(str(file), tmp_path).examples(split)
    assert says in str(caught.value)


def test_data_is_never_from_somewhere_else(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "other.jsonl").write_text("{}\n")
    with pytest.raises(sqft.UsageError, match=r"needs .*train\.jsonl .* has other\.jsonl"):
        get_task("gsm8k", tmp_path).examples("train")
    with pytest.raises(sqft.UsageError, match="there is no folder"):
        get_task("gsm8k", tmp_path / "nowhere").examples("train")
    with pytest.raises(sqft.SqftError, match="or give data_dir"):  # offline, or no such name
        get_task("gsm8k").examples("train")
    with pytest.raises(sqft.UsageError, match="on no hub: give data_dir"):
        get_task("addsub").examples("test")
    with pytest.raises(sqft.UsageError, match="leave data_dir out"):
        get_task("arithmetic", tmp_path)
    with pytest.raises(sqft.UsageError, match="unknown task 'gms8k'.*gsm8k"):
        get_task("gms8k")
    with pytest.raises(sqft.UsageError, match="no split 'train'"):
        get_task("addsub", tmp_path).examples("train")


def test_every_shipped_task_is_read() -> None:
    assert {"gsm8k", "mawps", "svamp", "boolq", "hellaswag"} <= set(shipped_specs())
    for name in shipped_specs():
        task = get_task(name)
        assert task.name == name and set(task.splits) <= {"train", "validation", "test"}


def test_a_task_files_checked_values_are_used(tmp_path: Path) -> None:
    """A text where a list is asked for is one entry, also with commas in it; a number in quotes is a number."""
    file = tmp_path / "capitals.yaml"
    file.write_text(CUSTOM.replace('stop: ["."]', 'stop: "END"\nignore: ","').replace("tokens: 8", 'tokens: "8"'))
    task = get_task(str(file))
    assert task.stop == ["END"] and task.ignore == [","] and task.max_new_tokens == 8
    file.write_text(CUSTOM.replace('stop: ["."]', 'stop: ["a,b", ","]'))
    assert get_task(str(file)).stop == ["a,b", ","]
    assert get_task("gsm8k").ignore[0] == ","


def test_tasks_of_other_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point gives a task, a spec, or the path of a YAML file; it does not replace what comes with sqft."""
    (tmp_path / "capitals.yaml").write_text(CUSTOM)
    spec = get_task(str(tmp_path / "capitals.yaml"))
    given = {
        "sums": ArithmeticTask(seed=1),
        "spec": spec,
        "file": str(tmp_path / "capitals.yaml"),
        "gsm8k": ArithmeticTask(),
    }

    class Point:
        def __init__(self, name: str) -> None:
            self.name, self.value = name, f"somewhere:{name}"

        def load(self) -> object:
            return given[self.name]

    monkeypatch.setattr("sqft.registry.entry_points", lambda group: [Point(n) for n in given if group == "sqft.tasks"])
    monkeypatch.delitem(TASKS.__dict__, "_plugins", raising=False)
    try:
        write(tmp_path / "capitals" / "test.jsonl", [{"country": "France", "capital": "Paris"}])
        assert get_task("sums") is given["sums"] and get_task("gsm8k").name == "gsm8k"
        assert get_task("spec", tmp_path).examples("test") == get_task("file", tmp_path).examples("test")
        assert get_task("sums+spec").name == "sums+spec"
        with pytest.raises(sqft.UsageError, match="makes its problems itself"):
            get_task("sums", tmp_path)
        with pytest.raises(sqft.UsageError, match="did you mean 'sums'"):
            get_task("sumz")
    finally:
        TASKS.__dict__.pop("_plugins", None)
