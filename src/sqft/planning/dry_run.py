"""``--dry-run``: what a recipe would do and about what it would take, without loading or writing anything.

A model skeleton on the ``meta`` device goes through the stages, so that options which do not fit the model (a group
size, a module pattern, an adapter) are the same errors as in the run itself, only earlier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sqft import artifact
from sqft.adapters.groups import make_groups
from sqft.calibration.data import SUFFIXES, read_records
from sqft.compressing.passes import patterns, quantized_layers
from sqft.errors import SqftError
from sqft.formats.checkpoint import is_packed, plan_tensors
from sqft.keys import folder_key, stage_key
from sqft.measuring.size import human
from sqft.models.dense import DTYPES, locate
from sqft.models.discover import describe, resolve_targets
from sqft.planning.device import Speed, measure_device
from sqft.planning.estimate import Estimate, Run
from sqft.planning.shape import shape_of, skeleton
from sqft.planning.workload import Workload, counter, of_task, of_training
from sqft.recipe import Recipe, Step, finished, resolve_model, steps
from sqft.registry import KINDS
from sqft.reporting.commands import changed_options
from sqft.reporting.tables import Column, Table, duration
from sqft.searching import evaluator
from sqft.searching import stage as searching
from sqft.stages import STAGES
from sqft.training import loop

PROCESS = 500 * 10**6  # bytes of the interpreter and libraries
FACTOR = 2  # that estimates were right within, on SmolLM2-135M: docs/recipes.md


@dataclass
class PlannedStep:
    """What is not known is None: ``note`` says why."""

    name: str
    parent: str
    output: str
    options: dict[str, Any]
    state: str  # skip, resume or run
    seconds: float | None = None
    memory_bytes: float | None = None
    disk_bytes: float | None = None
    flops: float | None = None
    note: str = ""


@dataclass
class DryRun:
    """``seconds`` is of all that is not skipped, if all of it is known."""

    model: str
    steps: list[PlannedStep]
    parameters: int | None = None
    weight_bytes: float | None = None
    seconds: float | None = None
    speed: Speed | None = None
    factor: float = FACTOR
    notes: list[str] = field(default_factory=list)


def dry_run(recipe: Recipe, *, model: str | None = None, output: str | None = None) -> DryRun:
    """Plans a run of the recipe. Raises the UsageErrors that the run would, as far as they can be seen from here."""
    recipe = recipe.at(model, output)
    source = resolve_model(recipe.model)
    locate(source)
    result = DryRun(recipe.model, [])
    walk = None
    try:
        walk = Walk(source)
        result.parameters, result.weight_bytes = walk.run.shape.parameters, walk.run.bytes
        result.speed = measure_device(walk.dtype)
    except SqftError as error:
        if Path(source).exists():
            raise
        result.notes.append(f"model not here: no estimate ({error})")
    found = steps(recipe)
    states = _states(found) if Path(recipe.output).is_dir() else [("run", "")] * len(found)
    for step, (state, note) in zip(found, states, strict=True):
        planned = PlannedStep(step.name, step.source, str(step.folder), changed_options(step.config), state, note=note)
        if state != "skip":
            artifact.check_output(step.folder, overwrite=True)
            _check_sources(step.config)
        if walk is not None and result.speed is not None:
            guess = walk.take(step)  # also what is skipped changes the skeleton
            if state != "skip":
                _fill(planned, walk, guess, result.speed)
        result.steps.append(planned)
    pending = [step.seconds for step in result.steps if step.state != "skip"]
    result.seconds = None if None in pending else sum(seconds or 0 for seconds in pending)
    return result


def show(plan: DryRun) -> None:
    """Prints the steps; then the model, the sum, what it was reckoned with, and how far that may be off."""
    rows = [{**asdict(step), "parent": Path(step.parent).name, "options": step.options or None,
             "state": f"{step.state}: {step.note}" if step.note else step.state} for step in plan.steps]  # fmt: skip
    Table(COLUMNS, rows).show()
    lines, speed = list(plan.notes), plan.speed
    if plan.parameters and plan.weight_bytes:
        lines.append(f"{plan.model}: {plan.parameters / 1e6:.1f} M parameters, {human(plan.weight_bytes)}")
    if plan.seconds is not None:
        lines.append(f"All that is not skipped: about {duration(plan.seconds)}")
    if speed:
        lines.append(
            f"Estimates: FLOPs and bytes over what was measured here ({speed.device}: {speed.products / 1e9:.0f} "
            f"GFLOP/s, {speed.fast / 1e9:.0f} by the fastest library, {speed.moved / 1e9:.0f} GB/s); on "
            f"SmolLM2-135M right within a factor of {plan.factor:g}. Formulas: docs/recipes.md"
        )
    print("\n".join(lines))


def _options(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={','.join(map(str, v)) if isinstance(v, (list, tuple)) else v}" for key, v in values.items()
    )


COLUMNS = (
    Column("stage", "name"), Column("of", "parent"), Column("state", "state"), Column("time", "seconds", duration),
    Column("memory", "memory_bytes", human), Column("on disk", "disk_bytes", human),
    Column("options that are not the default", "options", _options),
)  # fmt: skip


def _check_sources(config: Any) -> None:
    """Raises UsageError for a text or data file that is not there."""
    for name in ("calibration", "data", "eval_data", "text"):
        value = getattr(config, name, None)
        if value and value.endswith(SUFFIXES) and not Path(value).is_file():
            read_records(value)


def _states(found: list[Step]) -> list[tuple[str, str]]:
    """For each step skip, resume or run, and a note. Keys follow from the parents' keys, so nothing has to be there."""
    keys: dict[str, str] = {}
    states = []
    for step in found:
        parent = keys.get(step.source) or folder_key(step.source)
        key = stage_key(step.stage, step.config, parent)
        keys[str(step.folder)] = key
        said: list[str] = []
        if finished(step.folder, key, said.append) is not None:
            states.append(("skip", "unchanged"))
            continue
        note = said[0] if said else "other options or inputs than before" if artifact.is_stage(step.folder) else ""
        begun = loop.last_checkpoint(loop.work_folder(step.folder, key)) if step.stage == "train" else None
        if begun is not None:
            states.append(("resume", f"from step {begun.name.rsplit('-', 1)[1]}"))
        elif step.stage == "search" and searching.work_folder(step.folder, step.config, parent).is_dir():
            states.append(("resume", "with what was tried"))
        else:
            states.append(("run", note))
    return states


def _fill(planned: PlannedStep, walk: Walk, guess: Estimate | None, speed: Speed) -> None:
    planned.disk_bytes = None if planned.name.startswith("evaluate/") else walk.disk
    if guess is None:
        planned.note = "; ".join(filter(None, (planned.note, "data not here: no estimate (--data-dir)")))
        return
    planned.seconds, planned.flops = guess.work.seconds(speed), guess.work.flops
    planned.memory_bytes = guess.memory + (0 if walk.run.on_gpu else PROCESS)


class Walk:
    """A model without weights that goes through the stages of a run. ``run``: what it is now; ``disk``: bytes of what
    the last stage writes."""

    def __init__(self, source: str) -> None:
        self.model = skeleton(source)
        self.architecture = describe(self.model)
        self.packed = is_packed(source)  # its layers are float ones in the skeleton
        self.count = counter(source)
        shape = shape_of(self.model, self.architecture)
        bits = 4.5 / 8 if self.packed else shape.itemsize
        size = shape.weights * bits + (shape.parameters - shape.weights) * shape.itemsize
        self.run = Run(shape, size, self.packed, locate(source)[1] is not None, on_gpu=torch.accelerator.is_available())
        self.runs: dict[str, Run] = {source: self.run}
        self.tuned: set[str] = set()
        self.disk = self.base_disk = size
        self.dtype = next(self.model.parameters()).dtype

    def take(self, step: Step) -> Estimate | None:
        """What a step takes; None if its data is not here. The model is what the step gives, afterwards."""
        run = self.runs.get(step.source, self.run)
        data = CHANGES[step.stage](self, step)
        self.runs[str(step.folder)] = self.run
        if step.stage in ("train", "search", "merge"):
            self.tuned.add(str(step.folder))
        return data and STAGES[step.stage].estimator()(run._replace(adapted=self.run.adapted), step.config, data)


def _sparsify(walk: Walk, step: Step) -> Workload:
    names = patterns(walk.architecture, step.config)
    if step.config.dtype != "auto":
        walk.model.to(DTYPES[step.config.dtype])
    shape = shape_of(walk.model, walk.architecture)
    walk.run = Run(shape, shape.parameters * shape.itemsize, on_gpu=walk.run.on_gpu)
    masks = sum(linear.weights for linear in shape.linears if linear.name in names) / 8
    walk.disk = walk.base_disk = walk.run.bytes + masks
    return Workload()


def _quantize(walk: Walk, step: Step) -> Workload:
    layers = quantized_layers(walk.architecture, step.config)
    tensors = plan_tensors(walk.model, layers, step.config.format)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    for weight in walk.architecture.weights():
        if weight.name in layers:
            weight.replace(layers[weight.name])
    walk.run = walk.run._replace(bytes=size, packed=True, gguf=False)
    walk.disk = walk.base_disk = size  # masks are stored by their exceptions
    return Workload()


def _train(walk: Walk, step: Step) -> Workload | None:
    config = step.config
    if not walk.packed:
        loop.check_kind(walk.model, KINDS[config.adapter], step.source)
    names = set(resolve_targets(walk.architecture, config.target_modules))
    adapted = [linear for linear in walk.run.shape.linears if linear.name in names]
    make_groups([linear.name for linear in adapted], config.rank_groups, config.search_space or [config.r])
    rank = max(config.search_space) if config.search_space else config.r
    walk.disk = 4 * rank * sum(linear.inputs + linear.outputs for linear in adapted)
    walk.run = walk.run._replace(adapted=adapted)
    return of_training(config, walk.count)


def _search(walk: Walk, step: Step) -> Workload | None:
    config = step.config
    if config.split == "test" or config.data_dir or config.task in (None, "arithmetic"):
        evaluator.search_task(config)
    return of_task(config, True, walk.count)


def _merge(walk: Walk, step: Step) -> Workload:
    walk.disk = walk.base_disk
    return Workload()


def _evaluate(walk: Walk, step: Step) -> Workload | None:
    return of_task(step.config, step.source in walk.tuned, walk.count)


CHANGES: dict[str, Callable[[Walk, Step], Workload | None]] = {  # what a stage does to the skeleton, and what it reads
    "sparsify": _sparsify, "quantize": _quantize, "train": _train, "search": _search, "merge": _merge,
    "evaluate": _evaluate,
}  # fmt: skip
