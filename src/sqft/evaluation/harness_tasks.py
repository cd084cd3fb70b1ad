"""sqft's tasks as tasks of lm-evaluation-harness, in YAML files that any lm-eval reads. A problem becomes a record of
strings that the task's own templates made, so the harness sees what training and sqft's own scorers see."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from sqft import artifact
from sqft.errors import UsageError
from sqft.tasks.base import Example, Task
from sqft.tasks.lookup import get_task, parts_of
from sqft.tasks.spec import SpecTask

SHOTS = "train"  # few-shot examples come from this split
STRICT = "strict-match"  # the filter whose match is the task's own
FLEXIBLE = {"gsm8k": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"}  # second filters, as lm-eval's task of that name has them
_EDGES = r"^\s+|\s+$"  # spaces around an answer never count here
_MEAN = {"aggregation": "mean", "higher_is_better": True}
_SCORER = "sqft.evaluation.harness_tasks.process_results"

Document = dict[str, Any]


def harness_name(task: Task) -> str:
    """The task's name in lm-eval: with a prefix, so that it is never taken for the one that comes with lm-eval."""
    return "sqft_" + re.sub(r"[^\w.-]", "_", task.name)


def task_config(task: Task, examples: Sequence[Example], split: str, fewshot: int) -> dict[str, Any]:
    """lm-eval's config of a task, without its data: only what YAML can hold. ``process_results``, where there is one,
    is the name of the function that calls the task's own ``is_correct``."""
    config: dict[str, Any] = {"task": harness_name(task), "test_split": split, "num_fewshot": fewshot}
    if fewshot:
        config["fewshot_split"] = SHOTS
    if examples[0].options:
        varied = _contexts_vary(examples[0])
        config |= {
            "output_type": "multiple_choice", "doc_to_text": "gold" if varied else "prompt",
            "doc_to_choice": "options", "doc_to_target": "continuation" if varied else "gold", "target_delimiter": " ",
            "metric_list": [{"metric": "acc", **_MEAN}, {"metric": "acc_norm", **_MEAN}],
        }  # fmt: skip
    else:
        until = {"until": list(task.stop), "max_gen_toks": task.max_new_tokens, "do_sample": False, "temperature": 0.0}
        config |= {
            "output_type": "generate_until", "doc_to_text": "prompt", "doc_to_target": "answer", "target_delimiter": "",
            "fewshot_config": {"doc_to_target": "completion"}, "generation_kwargs": until, **_scoring(task),
        }  # fmt: skip
    return {**config, "fewshot_delimiter": "\n\n", "metadata": {"version": 1.0}}


def _scoring(task: Task) -> dict[str, Any]:
    """How generated texts are scored: as YAML where that can say it, else by the task's own function."""
    metric = {"metric": "exact_match", **_MEAN}
    if not (isinstance(task, SpecTask) and task.metric == "exact-match"):
        return {"metric_list": [metric], "process_results": _SCORER}
    metric |= {"ignore_case": True, "ignore_punctuation": False, "regexes_to_ignore": [*task.ignore, _EDGES]}
    filters = [_regex(STRICT, task.extract, 0 if task.pick == "first" else -1)]
    if task.name in FLEXIBLE:
        filters.append(_regex("flexible-extract", FLEXIBLE[task.name], -1))
    return {"metric_list": [metric], "filter_list": filters}


def _regex(name: str, pattern: str, which: int) -> dict[str, Any]:
    function = {"function": "regex", "regex_pattern": pattern, "group_select": which}
    return {"name": name, "filter": [function, {"function": "take_first"}]}


def main_filter(config: dict[str, Any]) -> str:
    """The filter whose scores are the task's own."""
    return STRICT if "filter_list" in config else "none"


def documents(task: Task, examples: Sequence[Example], split: str, fewshot: int) -> dict[str, list[Document]]:
    """lm-eval's records of each split that it needs. Raises UsageError for problems that it cannot take."""
    if not examples:
        raise UsageError(f"task {task.name} has no problems to evaluate in split '{split}'")
    found = {split: [_document(task, example, examples[0]) for example in examples]}
    if fewshot:
        if split == SHOTS:
            raise UsageError(f"few-shot examples come from split '{SHOTS}': evaluate another split, or without fewshot")
        shots = task.examples(SHOTS)
        if fewshot > len(shots):
            raise UsageError(f"fewshot is {fewshot}, but task {task.name} has {len(shots)} training examples")
        if not shots[0].completion:
            raise UsageError(f"task {task.name} has no 'completion', which few-shot examples need")
        found[SHOTS] = [_document(task, example, examples[0]) for example in shots]
    return found


def _document(task: Task, example: Example, first: Example) -> Document:
    if bool(example.options) != bool(first.options):
        raise UsageError(f"task {task.name} mixes multiple choice with other problems: make two tasks of it")
    if not example.options:
        return {"task": task.name, "prompt": example.prompt, "completion": example.completion, "answer": example.answer}
    contexts, continuations = zip(*example.options, strict=True)
    varied = _contexts_vary(first)
    if len(set(continuations if varied else contexts)) > 1 or not all(text[:1] == " " for text in continuations):
        raise UsageError(f"the options of task {task.name} differ in context and continuation, or a continuation does "
                         "not begin with a space: lm-eval cannot score that, use engine quick")  # fmt: skip
    record = {"task": task.name, "gold": example.gold, "answer": example.answer}
    if varied:
        return {**record, "options": list(contexts), "continuation": continuations[0][1:]}
    return {**record, "prompt": contexts[0], "options": [text[1:] for text in continuations]}


def _contexts_vary(example: Example) -> bool:
    return len({context for context, _ in example.options}) > 1


def scorer(task: Task) -> Callable[[Document, list[str]], dict[str, float]]:
    """lm-eval's ``process_results`` for a task at hand."""

    def process(document: Document, results: list[str]) -> dict[str, float]:
        example = Example(document["prompt"], document["completion"], document["answer"], task=task.name)
        return {"exact_match": float(task.is_correct(results[0], example))}

    return process


def process_results(document: Document, results: list[str]) -> dict[str, float]:
    """The same for a record of a file, which names its task."""
    return scorer(_task(document["task"]))(document, results)


@lru_cache
def _task(name: str) -> Task:
    return get_task(name)


def write_tasks(name: str, folder: str | Path, *, data_dir: str | Path | None = None, split: str = "test",
                limit: int | None = None, fewshot: int = 0, overwrite: bool = False) -> list[str]:  # fmt: skip
    """Writes a task (a name, a YAML file, or several: 'piqa+boolq') as tasks of lm-eval: for each a YAML file, and its
    problems beside it, with the train split if ``fewshot`` examples are wanted. Returns lm-eval's names of them.

    ``lm-eval --include_path FOLDER --tasks NAME`` then runs them on any model, offline; a task that YAML cannot score
    needs sqft installed. ``datasets`` wants absolute paths: a moved folder is to be written anew. Raises UsageError.
    """
    names, home = [], Path(folder).resolve()
    given = {"task": name, "split": split, "limit": limit, "fewshot": fewshot}
    with artifact.stage("tasks", None, folder, given=given, overwrite=overwrite) as made:
        for part in parts_of(name):
            task = get_task(part, data_dir)
            examples = task.examples(split, limit)
            of_splits = documents(task, examples, split, fewshot)
            config = task_config(task, examples, split, fewshot)
            found = str(Path(part).resolve()) if Path(part).is_file() else part  # by which process_results finds it
            files = {of: f"{config['task']}.{of}.jsonl" for of in of_splits}
            for of, records in of_splits.items():
                lines = (json.dumps({**record, "task": found}, ensure_ascii=False) + "\n" for record in records)
                (made.folder / files[of]).write_text("".join(lines), encoding="utf-8")
            data = {"data_files": {of: str(home / file) for of, file in files.items()}}
            text = yaml.safe_dump({**config, "dataset_path": "json", "dataset_kwargs": data}, sort_keys=False)
            text = text.replace(f"process_results: {_SCORER}", f"process_results: !function {_SCORER}")
            (made.folder / f"{config['task']}.yaml").write_text(text, encoding="utf-8")
            names.append(config["task"])
        made.metrics["lm_eval_tasks"] = ",".join(names)
    return names
