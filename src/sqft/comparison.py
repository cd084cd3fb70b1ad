"""``sqft compare``: the paper's table for one's own model and task, every method from the same recipe; and two runs.

A method is a base (dense, sparse, INT4), perhaps an adapter on it, whether that merges, and what comes after. Methods
share the stages that they have in common; one that is there already is skipped: an interrupted comparison goes on where
it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqft import artifact
from sqft.config import CompareConfig, MergeConfig, SearchConfig, SparsifyConfig, for_kind
from sqft.deployment import MeasureConfig
from sqft.errors import UsageError, did_you_mean
from sqft.evaluation.intervals import paired
from sqft.options import from_dict, to_dict
from sqft.outputs import locked
from sqft.recipe import Recipe, check_data, load_recipe, resolve_model, run_stage
from sqft.registry import KINDS
from sqft.reporting.collect import RESULT
from sqft.stages import STAGES
from sqft.strict import parse_json

Say = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """One row of the table. ``base``: model, sparsify or quantize; ``adapter``: the kind, if it is tuned; ``after``: a
    stage that takes the merged model; ``like``: the row whose adapter it has, which is trained once for both;
    ``teacher``: the row whose adapter it learns from; ``options``: of training, instead of the recipe's."""

    title: str
    base: str
    adapter: str | None = None
    elastic: bool = False
    after: str | None = None
    like: str | None = None
    teacher: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def one_model(self) -> bool | None:
        return None if self.adapter is None else KINDS[self.adapter].one_model


_ALL = {"target_modules": ["all"], "train_norms": True}
# The paper's rows in its order, one that tells the mask's part from the rank's, and what they have to be seen beside:
# what the dense model, all kept weights, and quantizing after merging would reach; then what learns from a teacher.
METHODS: dict[str, Contender] = {
    "dense": Contender("w/o tune, dense", "model"),
    "dense-lora": Contender("LoRA, dense", "model", "lora"),
    "sparse": Contender("w/o tune, sparse", "sparsify"),
    "lora": Contender("LoRA", "sparsify", "lora"),
    "shears": Contender("Shears", "sparsify", "lora", elastic=True),
    "sparse-peft-fixed": Contender("SparsePEFT, fixed rank", "sparsify", "sparse-peft"),
    "sparse-peft": Contender("SQFT + SparsePEFT", "sparsify", "sparse-peft", elastic=True),
    "sparse-full": Contender("all kept weights", "sparsify", "sparse-full"),
    "sparse-int4": Contender("w/o tune, sparse, INT4", "quantize"),
    "gptq-lora": Contender("GPTQ + LoRA", "quantize", "sqft"),
    "sqft": Contender("SQFT", "quantize", "sqft", elastic=True),
    "merge-gptq": Contender(
        "SQFT + SparsePEFT, then GPTQ", "sparsify", "sparse-peft", elastic=True, after="quantize", like="sparse-peft"
    ),
    "qa-sparse-peft": Contender("SQFT + QA-SparsePEFT", "quantize", "qa-sparse-peft", elastic=True),
    "distilled": Contender("SparsePEFT on all weights and norms, distilled", "sparsify", "sparse-peft",
                           teacher="dense-lora", options=_ALL),
    "distilled-gptq": Contender("the same, then GPTQ", "sparsify", "sparse-peft", after="quantize", like="distilled",
                                teacher="dense-lora", options=_ALL),
    "distilled-full": Contender("all kept weights, distilled", "sparsify", "sparse-full", teacher="dense-lora"),
    "distilled-qa": Contender("QA-SparsePEFT on all weights and norms, distilled", "quantize", "qa-sparse-peft",
                              teacher="dense-lora", options=_ALL),
}  # fmt: skip


def compare(recipe: Recipe | str | Path, *, model: str | None = None, output: str | Path | None = None,
            say: Say = lambda text: None) -> dict[str, Any]:  # fmt: skip
    """Runs every method of a recipe with ``train`` and ``evaluate`` and writes OUTPUT/compare.json.

    Each method's adapter is trained with the recipe's options, of elastic rank where the method is, the best
    sub-adapter searched by the validation split, merged if that can be, and evaluated. Returns the table: task, split,
    limit, model, and one row a method. Raises UsageError for a recipe that lacks a stage, or an unknown method.
    """
    recipe = (recipe if isinstance(recipe, Recipe) else load_recipe(recipe)).at(model, output)
    methods, sparsities = check(recipe)
    check_data(recipe)
    with locked(Path(recipe.output) / "run", recipe.output):
        return _compare(recipe, methods, sparsities, say)


def _compare(recipe: Recipe, methods: list[str], sparsities: list[float], say: Say) -> dict[str, Any]:
    out = Path(recipe.output)
    rows: list[dict[str, Any]] = []
    for sparsity in sparsities:
        of_sparsity = out / f"s{100 * sparsity:g}"
        for name in methods:
            if METHODS[name].base != "model":
                rows.append(run_method(name, recipe, sparsity, of_sparsity, say))
            elif sparsity == sparsities[0]:  # the dense model is one for all
                rows.append(run_method(name, recipe, None, out, say))
        _compare_with(rows, recipe["compare"].reference, sparsity, out)
        _write(recipe, rows, out)
    return _write(recipe, rows, out)


def with_methods(recipe: Recipe, sparsities: str | None = None, methods: str | None = None) -> Recipe:
    """The recipe with other sparsities or methods, each given as 'a,b,c'."""
    given = {"sparsities": sparsities, "methods": methods}
    config = to_dict(recipe["compare"] or CompareConfig()) | {k: v for k, v in given.items() if v is not None}
    return recipe.using(compare=from_dict(CompareConfig, config))


def check(recipe: Recipe) -> tuple[list[str], list[float]]:
    """The methods and sparsities that a recipe asks for. Raises UsageError for what it lacks."""
    for stage in ("train", "evaluate", "compare"):
        if recipe[stage] is None:
            raise UsageError(f"a comparison needs '{stage}' in its recipe, e.g. '{stage}: {{}}'")
    if not recipe["evaluate"].task:
        raise UsageError("a comparison needs a task to evaluate on, e.g. --task gsm8k")
    methods = list(recipe["compare"].methods or METHODS)
    for name in (*methods, recipe["compare"].reference):
        if name not in METHODS:
            raise UsageError(f"unknown method '{name}': {did_you_mean(name, METHODS)}")
    if not recipe["train"].search_space and any(METHODS[name].elastic for name in methods):
        raise UsageError("methods of elastic rank need a search_space in 'train', e.g. [32, 24, 16]")
    if recipe["train"].distill in ("model", "teacher"):
        raise UsageError("a comparison makes its own teacher, for the methods that have one: leave 'distill' out")
    sparsify = recipe["sparsify"] or SparsifyConfig()
    if sparsify.pattern and recipe["compare"].sparsities:
        raise UsageError(f"sparsities do not go with the pattern {sparsify.pattern} of 'sparsify': leave one out")
    sparsities = sorted(set(recipe["compare"].sparsities)) or [sparsify.sparsity]
    for sparsity in sparsities:
        replace(sparsify, sparsity=sparsity)  # one out of range is an error before any work
    return methods, sparsities


def run_method(name: str, recipe: Recipe, sparsity: float | None, out: Path, say: Say) -> dict[str, Any]:
    """Runs one method below ``out`` and returns its row; folders in it are relative to the comparison's output."""
    method = METHODS[name]
    root = Path(recipe.output)
    folders = {"model": resolve_model(recipe.model)}
    metrics: dict[str, Mapping[str, Any]] = {}

    def stage(kind: str, config: Any, source: str, folder: Path) -> None:
        metrics[kind] = run_stage(kind, config, folders[source], folder, say)
        folders[kind] = str(folder)

    if method.base != "model":
        sparsify = replace(recipe["sparsify"] or SparsifyConfig(), sparsity=sparsity)
        stage("sparsify", sparsify, "model", out / "sparsify")
    if method.base == "quantize":
        stage("quantize", recipe["quantize"] or STAGES["quantize"].config(), "sparsify", out / "quantize")
    if method.teacher:
        folders["teacher"] = folders["model"]
        for kind, config in adapter_stages(METHODS[method.teacher], recipe, folders):
            run_stage(kind, config, folders["teacher"], root / method.teacher / kind, say)
            folders["teacher"] = str(root / method.teacher / kind)
    last = method.base
    for kind, config in adapter_stages(method, recipe, folders):
        stage(kind, config, last, out / (method.like or name) / kind)
        last = kind
    if method.after:
        stage(method.after, recipe[method.after] or STAGES[method.after].config(), last, out / name / method.after)
        last = method.after
    stage("evaluate", recipe["evaluate"], last, out / name / "evaluate")
    stage("measure", recipe["measure"] or MeasureConfig(), last, out / name / "measure")
    train, search = (metrics.get(kind, {}) for kind in ("train", "search"))
    kept = metrics.get(last, {}).get("sparsity")
    return {
        "name": name, "method": method.title, "mergeable": method.one_model, "sparsity": sparsity,
        "precision": metrics["measure"]["precision"],
        **{key: metrics["evaluate"].get(key) for key in ("accuracy", "accuracy_ci95", "accuracy_norm", "problems")},
        "sparsity_kept": kept if method.one_model is not False else None,
        "size": metrics["measure"]["size"], "trainable_parameters": train.get("trainable_parameters"),
        "adapter_parameters": search.get("parameters", train.get("trainable_parameters")),
        "validation_score": search.get("score"),
        "train_seconds": train.get("seconds"), "train_peak_bytes": train.get("peak_bytes"),
        "decode_tokens_per_second": metrics["measure"]["decode_tokens_per_second"],
        "folder": _relative(folders[last], root), "evaluation": _relative(folders["evaluate"], root),
    }  # fmt: skip


def adapter_stages(method: Contender, recipe: Recipe, folders: Mapping[str, str]) -> list[tuple[str, Any]]:
    """The stages after the base: train, search and merge with the recipe's options, as far as the method has them."""
    if method.adapter is None:
        return []
    aware = KINDS[method.adapter].quantization_aware
    float_base = folders["sparsify"] if aware and recipe["train"].base else None
    train = replace(for_kind(recipe["train"], method.adapter), base=float_base, **method.options)
    if method.teacher:
        train = replace(train, distill=folders["teacher"])
    if not method.elastic:
        train = replace(train, search_space=[], rank_groups=[], rank_scaling="largest", distill_ranks=False)
    stages: list[tuple[str, Any]] = [("train", train)]
    if method.elastic:  # without a search in the recipe: the paper's heuristic
        by_heuristic = SearchConfig(strategy="median", task=train.task, data_dir=train.data_dir, metric="loss")
        stages.append(("search", recipe["search"] or by_heuristic))
    if KINDS[method.adapter].merges:
        stages.append(("merge", recipe["merge"] or MergeConfig()))
    return stages


def _relative(folder: str, root: Path) -> str | None:
    """Relative to the comparison; the dense model lies outside of it."""
    path = Path(folder)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else None


def _compare_with(rows: list[dict[str, Any]], reference: str, sparsity: float, out: Path) -> None:
    """Adds to each row of a sparsity the interval of its difference to the reference's accuracy, if that was run."""
    mine = [row for row in rows if row["sparsity"] in (sparsity, None)]
    theirs = next((row for row in mine if row["name"] == reference), None)
    if theirs is None:
        return
    expected = read_correct(out / theirs["evaluation"])
    for row in mine:
        found = read_correct(out / row["evaluation"])
        if row is not theirs and len(found) == len(expected):
            row["difference_ci95"] = list(paired(found, expected))


def read_correct(evaluation: Path) -> list[bool]:
    """Which problems an evaluation's folder says were solved, in the task's order."""
    lines = (evaluation / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [parse_json(line, data=True)["correct"] for line in lines]


def _write(recipe: Recipe, rows: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    result = {
        "task": recipe["evaluate"].task, "split": recipe["evaluate"].split, "limit": recipe["evaluate"].limit,
        "model": recipe.model, "reference": recipe["compare"].reference, "rows": rows,
    }  # fmt: skip
    artifact.write_text(out / RESULT, json.dumps(result, indent=1) + "\n")
    return result
