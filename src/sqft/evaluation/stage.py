"""The evaluate stage: a model, live or in a folder, to scores."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from sqft import artifact
from sqft.config import EvaluateConfig
from sqft.elastic.handle import Elastic
from sqft.elastic.heuristics import resolve_ranks
from sqft.errors import UsageError
from sqft.evaluation.harness import require_harness, run_harness
from sqft.evaluation.perplexity import perplexity
from sqft.evaluation.scoring import score, unpacked
from sqft.folders import load
from sqft.models.types import Tokenizer
from sqft.probe import evaluating
from sqft.tasks.base import Task
from sqft.tasks.lookup import get_task


def evaluate(model: nn.Module | str | Path, config: EvaluateConfig, *, tokenizer: Tokenizer | None = None,
             out: str | Path | None = None, overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Scores a live model (needs ``tokenizer``) or a folder or hub name of any stage.

    Returns accuracy with interval for ``config.task``, perplexity with interval for ``config.text``, and seconds. With
    ``out``, a folder takes them and, for a task, ``predictions.jsonl``; of lm-eval also its ``results.json``.
    """
    if config.engine == "lm-eval":
        require_harness()
    task = get_task(config.task, config.data_dir) if config.task else None
    if task is not None:
        task.examples(config.split, 1)  # an unknown split is an error before any work
    source = model if isinstance(model, (str, Path)) else ""
    with artifact.stage("evaluate", config, out, source, overwrite=overwrite) as made:
        live: Any = model
        if isinstance(model, (str, Path)):
            live, tokenizer = load(model, dtype=config.dtype, device=config.device)
        if tokenizer is None:
            raise UsageError("evaluating a live model needs its tokenizer: pass tokenizer=...")
        metrics, files = _scores(live, tokenizer, task, config, source)
        made.metrics.update(metrics)
        for name, text in files.items() if out is not None else ():
            (made.folder / name).write_text(text, encoding="utf-8")
    return made.metrics


def _scores(model: Any, tokenizer: Tokenizer, task: Task | None, config: EvaluateConfig,
            source: str | Path) -> tuple[dict[str, Any], dict[str, str]]:  # fmt: skip
    """Metrics, and the texts of the files that go with them."""
    metrics: dict[str, Any] = {"ranks": config.ranks} if config.ranks else {}
    files: dict[str, str] = {}
    with contextlib.ExitStack() as held:
        held.enter_context(evaluating(model))
        if config.ranks:
            ranks = resolve_ranks(model, config.ranks, source)
            held.enter_context(Elastic(model).at(ranks))
        if config.unpack:
            held.enter_context(unpacked(model))
        if task is not None:
            if config.engine == "lm-eval":
                scores, records, harness = run_harness(model, tokenizer, task, config.split, config.limit,
                                                       config.fewshot, config.batch_size)  # fmt: skip
                files["results.json"] = json.dumps(harness, indent=2, ensure_ascii=False) + "\n"
            else:
                scores, records = score(model, tokenizer, task, config.split, config.limit, config.batch_size)
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            files["predictions.jsonl"] = "".join(lines)
            metrics.update(task=task.name, split=config.split, **scores)
        if config.text:
            batch = max(1, config.batch_size // 8)  # logits of whole windows are held, not of one token
            metrics.update(perplexity(model, tokenizer, config.text, config.length, config.max_tokens, batch))
    return metrics, files
