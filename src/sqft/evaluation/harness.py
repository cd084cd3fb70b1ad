"""The bridge to lm-evaluation-harness: its scores of a live model in sqft's form, and its command line with sqft's
models. lm-eval is an optional library and is imported where it is used."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sqft.errors import UsageError
from sqft.evaluation.choices import option_texts
from sqft.evaluation.harness_tasks import documents, harness_name, main_filter, scorer, task_config
from sqft.evaluation.scoring import summarize
from sqft.models.types import Tokenizer
from sqft.tasks.base import Example, Task

FEWSHOT_SEED = 1234  # lm-eval's own default

Record = dict[str, Any]


def require_harness() -> str:
    """lm-eval's version. Raises UsageError if it is not installed."""
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError("lm-evaluation-harness is not installed: pip install 'sqft[harness]'") from None


def register_model() -> None:
    """Makes ``--model sqft`` known to lm-eval in this process; the class is imported when it is first used."""
    import lm_eval.models  # noqa: F401  # lm-eval registers its own only while the registry is empty
    from lm_eval.api.registry import model_registry

    if "sqft" not in model_registry:
        model_registry.register("sqft", target="sqft.evaluation.harness_model:SqftLM")


def lm_eval_command(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, with ``--model sqft``. Raises UsageError for what lm-eval does not find or take."""
    require_harness()
    from lm_eval.__main__ import cli_evaluate

    register_model()
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    except ValueError as error:  # e.g. unknown tasks
        raise UsageError(f"lm-eval: {error}") from error
    finally:
        sys.argv = before


def run_harness(model: Any, tokenizer: Tokenizer, task: Task, split: str, limit: int | None = None,
                fewshot: int = 0, batch_size: int = 32) -> tuple[Record, list[Record], Record]:  # fmt: skip
    """Scores a live model by lm-eval, ``fewshot`` examples of the train split before each problem. Returns metrics and
    one record a problem, as sqft's own scorer gives them, and lm-eval's results, in the form of its results.json.
    Raises UsageError, also if lm-eval is not installed."""
    version = require_harness()
    from lm_eval import evaluator
    from lm_eval.api.task import ConfigurableTask

    from sqft.evaluation.harness_model import SqftLM

    started = time.time()
    parts: Sequence[Task] = getattr(task, "parts", (task,))
    examples = {harness_name(part): part.examples(split, limit) for part in parts}
    tasks: dict[str, Any] = {}
    with _quiet():
        for part in parts:
            name = harness_name(part)
            data = documents(part, examples[name], split, fewshot)
            config = task_config(part, examples[name], split, fewshot) | {"custom_dataset": _loader(data)}
            if "process_results" in config:
                config["process_results"] = scorer(part)
            tasks[name] = ConfigurableTask(config=config)
            tasks[name].set_fewshot_seed(FEWSHOT_SEED)
        lm = SqftLM(model, copy.deepcopy(tokenizer), batch_size=batch_size)  # lm-eval changes its padding
        results: Any = evaluator.evaluate(lm=lm, task_dict={"tasks": tasks})
    records = []
    for part in parts:
        name = harness_name(part)
        del results["configs"][name]["custom_dataset"]  # its source, which says nothing
        records += _records(part, examples[name], results["samples"][name], main_filter(results["configs"][name]))
    del results["samples"]  # they are our records
    results["config"] = {"model": "sqft", **lm.get_model_info(), "batch_size": batch_size, "limit": limit,
                         "fewshot_seed": FEWSHOT_SEED}  # fmt: skip
    results |= {"date": started, "lm_eval_version": version}
    metrics = {**summarize(records), "engine": f"lm-eval {version}", "fewshot": fewshot}
    return metrics, records, json.loads(json.dumps(results, default=str))


def _loader(data: Mapping[str, Sequence[Record]]) -> Callable[..., Any]:
    """The data as lm-eval asks for them: nothing is written, and nothing cached."""
    from datasets import Dataset, DatasetDict

    def load(**_: Any) -> Any:
        return DatasetDict({split: Dataset.from_list(list(records)) for split, records in data.items()})

    return load


def _records(task: Task, examples: Sequence[Example], samples: Sequence[Record], chosen: str) -> list[Record]:
    """One record a problem, with what sqft's own scorer writes."""
    mine = sorted((sample for sample in samples if sample["filter"] == chosen), key=lambda sample: sample["doc_id"])
    records = []
    for example, sample in zip(examples, mine, strict=True):
        contexts = [arguments[0] for arguments in sample["arguments"]]
        record = {"prompt": contexts[max(0, example.gold)], "answer": example.answer, "task": task.name}
        if example.options:
            scores = [float(score) for score, _ in sample["filtered_resps"]]
            record |= {"generated": option_texts(example)[scores.index(max(scores))],
                       "correct": sample["acc"] == 1.0, "correct_norm": sample["acc_norm"] == 1.0,
                       "log_likelihoods": scores}  # fmt: skip
        else:
            record |= {"generated": sample["resps"][0][0], "correct": bool(sample["exact_match"] == 1.0)}
        records.append(record)
    return records


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without verbose logging lm-eval's advice to its own users stays silent."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    if not logging.getLogger().isEnabledFor(logging.INFO):
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
