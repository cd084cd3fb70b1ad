"""sqft: adapt a sparse language model with low-rank adapters that merge back without losing a zero. The public API,
imported lazily: ``import sqft`` does no work."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# What is not a stage's function or options, which the rows of ``stages`` name.
_WHERE = {
    "bench": "sqft.benching.run", "BenchConfig": "sqft.deployment", "SqftConfig": "sqft.adapters.config",
    "attach": "sqft.adapters.peft_bridge", "compare": "sqft.comparison",
    "compress": "sqft.compressing.stage", "Distill": "sqft.training.distill", "Elastic": "sqft.elastic.handle",
    "generate": "sqft.serving.generate", "GenerateConfig": "sqft.deployment", "get_ranks": "sqft.elastic.handle",
    "prepare": "sqft.serving.prepare", "serve": "sqft.serving.serve",
    "ServeConfig": "sqft.deployment", "set_ranks": "sqft.elastic.handle", "RankScheduler": "sqft.elastic.scheduler",
    "SqftError": "sqft.errors", "UsageError": "sqft.errors", "VerificationError": "sqft.errors", "load": "sqft.folders",
    "save": "sqft.folders", "run": "sqft.recipe", "report": "sqft.reporting.page", "Example": "sqft.tasks.base",
}  # fmt: skip


def _stages() -> dict[str, Any]:
    rows = importlib.import_module("sqft.stages").ROWS
    return {**{row.name: row for row in rows}, **{row.config.__name__: row for row in rows}}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name == "__all__":
        return __dir__()
    if name.startswith("_") or (row := _stages().get(name)) is None:
        raise AttributeError(f"module 'sqft' has no attribute '{name}'")
    return row.function if name == row.name else row.config


def __dir__() -> list[str]:
    return sorted([*_WHERE, *_stages()])
