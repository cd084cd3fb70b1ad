"""One row a stage: everything that lists stages (recipes, command line, tables, reports, dry runs) reads these rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqft import config, deployment
from sqft.config import even
from sqft.errors import UsageError, did_you_mean
from sqft.processes import alone, count


@dataclass(frozen=True)
class Stage:
    """A stage, which takes one folder and makes another.

    ``verb`` and ``estimate`` are "module:function": the public function ``verb(source, config, out=, overwrite=)``, and
    what a dry run asks for its time and memory. ``makes``: "model", "adapter", or "numbers" about its input.
    ``argument`` is the input's name on the command line, ``takes`` and ``writes`` say what it and OUT hold.
    ``of_run``: it makes part of a run, in the order of the rows. ``together``: whether several processes divide its
    work, by its options.
    """

    name: str
    config: type
    verb: str
    help: str
    makes: str
    takes: str
    argument: str = "MODEL"
    writes: str = "folder to write"
    estimate: str = ""
    of_run: bool = True
    together: Callable[[Any], bool] = lambda config: False

    @property
    def function(self) -> Callable[..., Any]:
        return _load(self.verb)

    def perform(self, config: Any, work: Callable[[], Any], say: Callable[[str], None]) -> Any:
        """What ``work`` gives, done by all processes together, or by the main one while the others wait."""
        if count() == 1 or self.together(config):
            return work()
        say(f"{self.name}: on one process, {count() - 1} wait")
        return alone(work)

    def estimator(self) -> Callable[..., Any]:
        return _load(self.estimate)


def _load(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def _calibrated(config: Any) -> bool:
    """Whether there is something to divide, and as many batches of one size as processes."""
    chooses = config.method not in ("magnitude", "rtn") and not getattr(config, "mask", None)
    walks = config.repair == "layer" or (config.repair == "none" and chooses)
    return walks and config.samples // even(config.samples, config.batch_size) >= count()


_MODEL = "folder, .gguf file or hub name"
_ADAPTER = "folder that 'sqft train' or 'sqft search' wrote"
ROWS = (
    Stage("sparsify", config.SparsifyConfig, "sqft.compressing.stage:sparsify", "prune a model's linear weights",
          "model", _MODEL, estimate="sqft.planning.estimate:sparsify", together=_calibrated),
    Stage("quantize", config.QuantizeConfig, "sqft.compressing.stage:quantize",
          "quantize a model's linear weights; pruned weights stay exactly zero", "model", _MODEL,
          estimate="sqft.planning.estimate:quantize", together=_calibrated),
    Stage("train", config.TrainConfig, "sqft.training.loop:train", "fine-tune adapters on a sparse model, or itself",
          "adapter", "folder of a sparse model, float or quantized", estimate="sqft.planning.estimate:train",
          together=lambda config: True),
    Stage("search", config.SearchConfig, "sqft.searching.stage:search",
          "find the best sub-adapter of an elastic adapter (NLS) by a validation split", "adapter",
          "folder that 'sqft train --search-space 32,24,16' wrote", "ADAPTER",
          "folder to write: the chosen sub-adapter, search.json and two plots",
          estimate="sqft.planning.estimate:search"),
    Stage("extract", config.ExtractConfig, "sqft.searching.choose:extract",
          "write one sub-adapter of an elastic adapter as a folder of its own", "adapter", _ADAPTER, "ADAPTER",
          of_run=False),
    Stage("merge", config.MergeConfig, "sqft.merging.stage:merge",
          "merge an adapter into its base and verify the result", "model", _ADAPTER, "ADAPTER",
          estimate="sqft.planning.estimate:merge"),
    Stage("evaluate", config.EvaluateConfig, "sqft.evaluation.stage:evaluate",
          "score a model: exact match of a task, perplexity of a text", "numbers",
          "folder of any stage, .gguf file or hub name", writes="also write scores and predictions to this folder",
          estimate="sqft.planning.estimate:evaluate", of_run=False),
    Stage("measure", deployment.MeasureConfig, "sqft.measuring.stage:measure",
          "bytes on disk and decode speed of what would be served", "numbers",
          "folder of any stage, or an adapter, which is served with its base", of_run=False),
    Stage("export", deployment.ExportConfig, "sqft.exporters.stage:export",
          "write a model as another tool wants it, verified", "model", "folder of a model", of_run=False),
    Stage("pack", deployment.PackConfig, "sqft.exporters.compacting:pack",
          "write a sparse model in compact form: a bit a weight, and the weights that are not pruned", "model",
          "folder of a sparse model", of_run=False),
    Stage("unpack", deployment.UnpackConfig, "sqft.exporters.compacting:unpack",
          "write a compact model as it was, bit for bit", "model", "folder that 'sqft pack' wrote", of_run=False),
)  # fmt: skip
STAGES = {row.name: row for row in ROWS}
RUN = tuple(row.name for row in ROWS if row.of_run)  # the stages of a run that make a model or adapter, in order


def get_stage(name: str) -> Stage:
    """The row of that name. Raises UsageError."""
    if name not in STAGES:
        raise UsageError(f"unknown stage '{name}': {did_you_mean(name, STAGES)}")
    return STAGES[name]
