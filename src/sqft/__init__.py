"""sqft: adapt a sparse language model with low-rank adapters that merge back without losing a zero.

The public API, imported lazily: ``import sqft`` does no work.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sqft.adapters.config import SqftConfig as SqftConfig
    from sqft.adapters.peft_bridge import attach as attach
    from sqft.comparison import compare as compare
    from sqft.compressing.stage import compress as compress
    from sqft.compressing.stage import quantize as quantize
    from sqft.compressing.stage import sparsify as sparsify
    from sqft.config import EvaluateConfig as EvaluateConfig
    from sqft.config import ExportConfig as ExportConfig
    from sqft.config import ExtractConfig as ExtractConfig
    from sqft.config import MeasureConfig as MeasureConfig
    from sqft.config import MergeConfig as MergeConfig
    from sqft.config import QuantizeConfig as QuantizeConfig
    from sqft.config import SearchConfig as SearchConfig
    from sqft.config import SparsifyConfig as SparsifyConfig
    from sqft.config import TrainConfig as TrainConfig
    from sqft.elastic.handle import Elastic as Elastic
    from sqft.elastic.handle import get_ranks as get_ranks
    from sqft.elastic.handle import set_ranks as set_ranks
    from sqft.elastic.scheduler import RankScheduler as RankScheduler
    from sqft.errors import SqftError as SqftError
    from sqft.errors import UsageError as UsageError
    from sqft.errors import VerificationError as VerificationError
    from sqft.evaluation.stage import evaluate as evaluate
    from sqft.exporters.stage import export as export
    from sqft.folders import load as load
    from sqft.folders import save as save
    from sqft.measuring.stage import measure as measure
    from sqft.merging.stage import merge as merge
    from sqft.recipe import run as run
    from sqft.reporting.page import report as report
    from sqft.searching.choose import extract as extract
    from sqft.searching.stage import search as search
    from sqft.tasks.base import Example as Example
    from sqft.training.loop import train as train

# What is not a stage's function or options, which the rows of ``stages`` name.
_WHERE = {
    "SqftConfig": "sqft.adapters.config",
    "attach": "sqft.adapters.peft_bridge",
    "compare": "sqft.comparison",
    "Elastic": "sqft.elastic.handle",
    "get_ranks": "sqft.elastic.handle",
    "set_ranks": "sqft.elastic.handle",
    "RankScheduler": "sqft.elastic.scheduler",
    "SqftError": "sqft.errors",
    "UsageError": "sqft.errors",
    "VerificationError": "sqft.errors",
    "load": "sqft.folders",
    "save": "sqft.folders",
    "run": "sqft.recipe",
    "report": "sqft.reporting.page",
    "compress": "sqft.compressing.stage",
    "Example": "sqft.tasks.base",
}


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
