"""Scores sub-adapters of one live model: ranks are switched in place, nothing is loaded again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sqft.adapters.groups import Ranks
from sqft.config import SearchConfig
from sqft.elastic.handle import SearchSpace, set_ranks
from sqft.errors import SqftError, UsageError
from sqft.evaluation.scoring import completion_loss, score, unpacked
from sqft.models.discover import input_device
from sqft.models.types import Tokenizer
from sqft.probe import evaluating
from sqft.tasks.base import Task, without_duplicates
from sqft.tasks.lookup import get_task

LATENCY_TOKENS, LATENCY_ROUNDS = 64, 5

Scorer = Callable[[Any], float]  # (model with its ranks set) -> score, more is better


def search_task(config: SearchConfig) -> Task:
    """The config's task. Raises UsageError for a test split, or a validation split that shares a problem with it."""
    if not config.task:
        raise UsageError("nothing to score by: give a task, e.g. --task arithmetic")
    if config.split == "test":
        raise UsageError("a search must not see the test split: choose by validation, then evaluate on test once")
    task = get_task(config.task, config.data_dir)
    chosen_by = task.examples(config.split, config.limit)
    try:
        others = task.examples("test") if "test" in task.splits else []
    except SqftError:  # it is not here: it cannot be looked through
        others = []
    shared = len(chosen_by) - len(without_duplicates(chosen_by, others))
    if shared:
        raise UsageError(f"{shared} problems of {config.task}'s {config.split} split are in its test split too: "
                         "a score chosen by them would not be a test score")  # fmt: skip
    return task


@dataclass
class Evaluator:
    """Score and cost of a configuration, and its score on the first ``config.screen`` problems alone."""

    model: Any
    tokenizer: Tokenizer | None
    config: SearchConfig
    space: SearchSpace
    scorer: Scorer | None = None

    def __post_init__(self) -> None:
        self._task = None if self.scorer else search_task(self.config)
        if self._task and self.tokenizer is None:
            raise UsageError("scoring a live model by a task needs its tokenizer: pass tokenizer=..., or a scorer")
        if self.scorer and self.config.screen:
            raise UsageError("screen goes with a task, not with a scorer of your own")

    def score(self, ranks: Ranks) -> float:
        return self._scored(ranks, self.config.limit)

    def screen(self, ranks: Ranks) -> float:
        return self._scored(ranks, self.config.screen)

    def _scored(self, ranks: Ranks, limit: int | None) -> float:
        set_ranks(self.model, ranks)
        with evaluating(self.model), unpacked(self.model):
            if self.scorer:
                return float(self.scorer(self.model))
            assert self._task is not None and self.tokenizer is not None
            split, size = self.config.split, self.config.batch_size
            if self.config.metric == "loss":
                return -completion_loss(self.model, self.tokenizer, self._task.examples(split, limit), size)
            return score(self.model, self.tokenizer, self._task, split, limit, size, quiet=True)[0]["accuracy"]

    def cost(self, ranks: Ranks) -> float:
        """Adapter parameters, or with ``config.cost`` 'latency' the median seconds of a forward pass."""
        if self.config.cost == "parameters":
            return float(self.space.parameters(ranks))
        set_ranks(self.model, ranks)
        tokens = torch.zeros(1, LATENCY_TOKENS, dtype=torch.int64, device=input_device(self.model))
        seconds = []
        with torch.no_grad():
            for _ in range(LATENCY_ROUNDS):
                started = time.perf_counter()
                self.model(input_ids=tokens, use_cache=False)
                seconds.append(time.perf_counter() - started)
        return sorted(seconds)[LATENCY_ROUNDS // 2]
