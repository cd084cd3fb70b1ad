"""What sqft asks a model, against the tasks of the same names that come with lm-evaluation-harness: equal strings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pico import pico_model, pico_tokenizer

from sqft.evaluation.harness import run_harness
from sqft.evaluation.harness_tasks import documents, main_filter, task_config
from sqft.tasks.base import Example
from sqft.tasks.lookup import get_task
from sqft.tasks.spec import SpecTask

pytest.importorskip("lm_eval", reason="needs the harness extra: pip install 'sqft[harness]'")

STOCK = {"arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge", "piqa": "piqa/piqa",
         "boolq": "super_glue/boolq/default", "hellaswag": "hellaswag/hellaswag", "winogrande": "winogrande/default",
         "openbookqa": "openbookqa/openbookqa", "gsm8k": "gsm8k/gsm8k"}  # fmt: skip
# Splits whose files are there: not everything of winogrande, boolq and openbookqa is.
REAL = {"arc_challenge": "validation", "winogrande": "train", "openbookqa": "validation"}

_LETTERS = ["A", "B", "C", "D"]
# One of each task, in the hub's fields, with what could go wrong: spaces at edges, brackets, several blanks.
RECORDS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {"question": "Which is {{not}} a metal? ", "choices": {"text": ["iron ", " gold", "oak", "1"], "label": _LETTERS}, "answerKey": "C"},
        {"question": "Pick\ntwo", "choices": {"text": ["one", "2"], "label": ["1", "2"]}, "answerKey": "2"},
    ],
    "piqa": [
        {"goal": "Open a jar", "sol1": "twist the lid", "sol2": "it's \"glued\"", "label": 0},
        {"goal": "", "sol1": "a", "sol2": "b ", "label": 1},
    ],
    "boolq": [{"passage": "Ice floats. [1]", "question": "does ice float", "title": "Ice", "label": 1, "answer": True}],
    "hellaswag": [
        {"activity_label": "Cooking", "ctx_a": "A man  cooks.", "ctx_b": "he tHEN", "label": "1",
         "endings": ["eats [step] it. [title] Done", " leaves  now ", "x", "[substeps] y."]},
        {"activity_label": " Edges", "ctx_a": "[header] How to [title] b", "ctx_b": "", "label": "0", "endings": ["a", "b", "c", "d"]},
    ],
    "winogrande": [
        {"sentence": "The cup fell off the _ because _ it shook .", "option1": "table", "option2": "shelf", "answer": "2"},
        {"sentence": "_ sat.", "option1": "Ann", "option2": "Bo", "answer": "1"},
    ],
    "openbookqa": [{"question_stem": "Rain is", "choices": {"text": ["wet", "dry", "red", "3"], "label": _LETTERS}, "answerKey": " A"}],
    "gsm8k": [{"question": "What is 1,000 + $5?", "answer": "It is <<1000+5=1005>>1005.\n#### 1,005"}],
}  # fmt: skip
RECORDS["arc_challenge"] = RECORDS["arc_easy"]


def write(file: Path, records: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(record) for record in records))


def configurable(config: dict[str, Any], data: dict[str, list[dict[str, Any]]]) -> Any:
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    loaded = DatasetDict({split: Dataset.from_list(records) for split, records in data.items()})
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: loaded, "num_fewshot": 0})
    task.set_fewshot_seed(0)
    return task


def stock(name: str, records: list[dict[str, Any]], **overrides: str) -> Any:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.tasks.__file__).parent
    config = {**load_yaml(folder / f"{STOCK[name]}.yaml", resolve_func=True), **overrides}
    return configurable(config, dict.fromkeys(("train", "validation", "test"), records))


def requests(task: Any, count: int) -> list[list[tuple]]:
    task.build_all_requests()
    found: list[list[tuple]] = [[] for _ in range(count)]
    for instance in sorted(task.instances, key=lambda i: (i.doc_id, i.idx)):
        found[instance.doc_id].append(instance.args)
    return found


def check(name: str, examples: list[Example], records: list[dict[str, Any]], sqft_task: SpecTask) -> None:
    """The stock task's requests, our examples, and the requests of the task that we hand to lm-eval are the same."""
    theirs = stock(name, records)
    ours = configurable(task_config(sqft_task, examples, "test", 0), documents(sqft_task, examples, "test", 0))
    asked, mine = requests(theirs, len(records)), requests(ours, len(records))
    assert len(examples) == len(records) > 0
    for i, (example, document) in enumerate(zip(examples, theirs.eval_docs, strict=True)):
        if name == "gsm8k":
            ((context, options),) = asked[i]
            assert (example.prompt, list(sqft_task.stop)) == (context, options["until"])
            assert example.completion == " " + theirs.doc_to_target(document)
            assert mine[i][0][0] == context and mine[i][0][1]["until"] == options["until"]
            continue
        assert list(example.options) == asked[i] == mine[i]
        gold = theirs.doc_to_text(document) if theirs.multiple_input else theirs.doc_to_target(document)
        assert example.gold == gold
        assert (example.prompt, example.completion) == asked[i][gold]


@pytest.mark.parametrize("name", STOCK)
def test_made_records(name: str, tmp_path: Path) -> None:
    task = get_task(name, tmp_path)
    assert isinstance(task, SpecTask)
    write(tmp_path / task.folder / f"{task.splits['test']}.jsonl", RECORDS[name])
    check(name, task.examples("test"), RECORDS[name], task)


@pytest.mark.parametrize("name", STOCK)
def test_real_records(name: str, shared: Path) -> None:
    data, split = shared / "data", REAL.get(name, "test")
    task = get_task(name, data)
    assert isinstance(task, SpecTask)
    records = task.records(task.splits[split])[:200]
    for record in records:
        if name == "boolq":  # the original files have 'answer' for the hub's 'label', of which it is the number
            record.setdefault("label", int(record["answer"]))
    assert len(records) == 200
    check(name, task.examples(split, 200), records, task)


GENERATED = ["#### 1,005", "#### 1005.", "so\n#### $1005", "####1005", "#### 1,005 dollars\n#### 7", "1005", "#### -1005",
             "", "#### 1005.0", "#### ...", "#### 7\n#### 1005", "it is 1005. #### 1005"]  # fmt: skip


def test_gsm8k_scores_as_the_stock_task_does() -> None:
    """strict-match and flexible-extract of the stock task, of ours, and sqft's own scorer, on the same texts."""
    records = [{**RECORDS["gsm8k"][0], "question": str(i)} for i in range(len(GENERATED))]
    task = get_task("gsm8k")
    assert isinstance(task, SpecTask)
    examples = [Example(f"Question: {i}\nAnswer:", " x", "1,005", task="gsm8k") for i in range(len(GENERATED))]
    config = task_config(task, examples, "test", 0)
    scores = {}
    for whose, harness in (("theirs", stock("gsm8k", records)),
                           ("ours", configurable(config, documents(task, examples, "test", 0)))):  # fmt: skip
        harness.build_all_requests()
        for instance, text in zip(harness.instances, GENERATED, strict=True):
            instance.resps.append(text)
        harness.apply_filters()
        for kind in ("strict-match", "flexible-extract"):
            scores[whose, kind] = [
                bool(harness.process_results(document, [instance.filtered_resps[kind]])["exact_match"])
                for document, instance in zip(harness.eval_docs, harness.instances, strict=True)
            ]
    assert main_filter(config) == "strict-match"
    correct = [task.is_correct(text, example) for text, example in zip(GENERATED, examples, strict=True)]
    assert scores["theirs", "strict-match"] == scores["ours", "strict-match"] == correct
    assert scores["theirs", "flexible-extract"] == scores["ours", "flexible-extract"] != correct
    assert 2 < sum(correct) < len(correct)


@pytest.mark.parametrize("name", STOCK)
def test_few_shot_contexts_equal_the_stock_tasks(name: str, tmp_path: Path) -> None:
    """With the same training problems and seed, the same examples in the same words come before each problem.

    Where a stock task has no test split lm-eval draws one example more and drops the problem itself: it is given one.
    """
    records = [{**record, **{key: f"{value} {i}" for key, value in record.items() if key in VARIED}}
               for i in range(5) for record in RECORDS[name][:1]]  # fmt: skip
    theirs = stock(name, records, test_split="test")
    theirs.set_config("num_fewshot", 2)
    theirs.set_fewshot_seed(1234)
    known = get_task(name)
    assert isinstance(known, SpecTask)
    spec = replace(known, splits={"train": "train", "test": "test"}, files={}, max_new_tokens=1, data_dir=tmp_path)
    for split in ("train", "test"):
        write(tmp_path / spec.folder / f"{split}.jsonl", records)
    model = pico_model()
    model.config.max_position_embeddings = 2048
    _, found, results = run_harness(model, pico_tokenizer(), spec, "test", fewshot=2)
    assert results["n-shot"] == {f"sqft_{name}": 2}
    golds = [0] * 5
    if name != "gsm8k":
        golds = [theirs.doc_to_text(d) if theirs.multiple_input else theirs.doc_to_target(d) for d in theirs.eval_docs]
    asked = [problem[gold][0] for problem, gold in zip(requests(theirs, 5), golds, strict=True)]
    assert [record["prompt"] for record in found] == asked and len(set(asked)) > 3


VARIED = ("question", "goal", "passage", "activity_label", "sentence", "question_stem")
