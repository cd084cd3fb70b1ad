"""``--dry-run``: what a recipe would do and about what it would take, without loading or writing anything.

A model skeleton on the ``meta`` device goes through the stages, so that options which do not fit the model (a group
size, a module pattern, an adapter) are the same errors as in the run itself, only earlier.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqft import artifact
from sqft.adapters.groups import make_groups
from sqft.calibration.data import SUFFIXES, read_records
from sqft.compressing.passes import patterns, quantized_layers
from sqft.errors import SqftError
from sqft.formats.checkpoint import is_packed, plan_tensors
from sqft.kernels.dispatch import pick_device
from sqft.models.dense import DTYPES, locate
from sqft.models.discover import describe, resolve_targets
from sqft.planning import estimate, workload
from sqft.planning.device import Speed, measure_device
from sqft.planning.estimate import Estimate, Run
from sqft.planning.shape import shape_of, skeleton
from sqft.recipe import Recipe, Step, finished, resolve_model, steps
from sqft.registry import KINDS
from sqft.searching import evaluator
from sqft.searching import stage as searching
from sqft.training import loop

PROCESS = 500 * 10**6  # bytes of the interpreter and libraries
FACTOR = 2  # that estimates were right within, on SmolLM2-135M: docs/recipes.md


@dataclass
class Planned:
    """A step of the plan. What is not known is None: ``note`` says why."""

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
class Plan:
    """What ``plan`` gives; ``seconds`` is of all that is not skipped, if all of it is known."""

    model: str
    steps: list[Planned]
    parameters: int | None = None
    weight_bytes: float | None = None
    seconds: float | None = None
    speed: Speed | None = None
    factor: float = FACTOR
    notes: list[str] = field(default_factory=list)


def plan(recipe: Recipe, *, model: str | None = None, output: str | None = None) -> Plan:
    """Plans a run of the recipe. Raises the UsageErrors that the run would, as far as they can be seen from here."""
    recipe = recipe.at(model, output)
    source = resolve_model(recipe.model)
    locate(source)
    walk, notes = None, []
    try:
        walk = Walk(source)
    except SqftError as error:
        if Path(source).exists():
            raise
        notes.append(f"model not here: no estimate ({error})")
    found = steps(recipe)
    states = _states(found) if Path(recipe.output).is_dir() else [("run", "")] * len(found)
    result = Plan(recipe.model, [], notes=notes)
    if walk is not None:
        result.parameters = walk.run.shape.parameters
        result.weight_bytes = walk.run.bytes
        result.speed = measure_device(walk.dtype)
    for step, (state, note) in zip(found, states, strict=True):
        planned = Planned(step.name, step.source, str(step.folder), changed_options(step.config), state, note=note)
        if state != "skip":
            artifact.check_output(step.folder, overwrite=True)
            _check_sources(step.config)
        if walk is not None:
            _fill(planned, walk, step, result.speed)
        result.steps.append(planned)
    pending = [step for step in result.steps if step.state != "skip"]
    if all(step.seconds is not None for step in pending):
        result.seconds = sum(step.seconds or 0 for step in pending)
    return result


def changed_options(config: Any) -> dict[str, Any]:
    """The options that are not the default's."""
    changed = {}
    for spec in dataclasses.fields(config):
        factory = spec.default_factory
        default = spec.default if factory is dataclasses.MISSING else factory()
        if getattr(config, spec.name) != default:
            changed[spec.name] = getattr(config, spec.name)
    return changed


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
        parent = keys.get(step.source) or artifact.folder_key(step.source)
        key = artifact.stage_key(step.stage, step.config, parent)
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


def _fill(planned: Planned, walk: Walk, step: Step, speed: Speed | None) -> None:
    """Lets the step's stage happen to the skeleton, and notes what it takes."""
    guess = walk.take(step)
    if planned.state == "skip":
        return
    planned.disk_bytes = walk.disk if step.stage != "evaluate" else None
    if guess is None:
        planned.note = "; ".join(filter(None, (planned.note, "data not here: no estimate (--data-dir)")))
        return
    assert speed is not None
    planned.seconds, planned.flops = guess.work.seconds(speed), guess.work.flops
    planned.memory_bytes = guess.memory + (PROCESS if pick_device().type == "cpu" else 0)


class Walk:
    """A model without weights that goes through the stages of a run."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.model = skeleton(source)
        self.architecture = describe(self.model)
        self.packed = is_packed(source)  # its layers are float ones in the skeleton
        self.count = workload.counter(source)
        shape = shape_of(self.model, self.architecture)
        bits = 4.5 / 8 if self.packed else shape.itemsize
        size = shape.weights * bits + (shape.parameters - shape.weights) * shape.itemsize
        self.run = Run(shape, size, self.packed, locate(source)[1] is not None)
        self.runs: dict[str, Run] = {source: self.run}
        self.tuned: set[str] = set()
        self.disk = self.base_disk = size
        self.dtype = next(self.model.parameters()).dtype

    def take(self, step: Step) -> Estimate | None:
        """What a step takes; None if its data is not here. The model is what the step gives, afterwards."""
        run, config = self.runs.get(step.source, self.run), step.config
        if step.stage == "sparsify":
            guess = self._sparsify(run, config)
        elif step.stage == "quantize":
            guess = self._quantize(run, config)
        elif step.stage == "train":
            guess = self._train(run, step)
        elif step.stage == "search":
            guess = self._search(run, config)
        elif step.stage == "merge":
            guess = estimate.merge(run)
            self.disk = self.base_disk
        else:
            work = workload.of_task(config, step.source in self.tuned, self.count)
            return work and estimate.evaluate(run, config, work.lengths, work.generated, work.text)
        self.runs[str(step.folder)] = self.run
        if step.stage in ("train", "search", "merge"):
            self.tuned.add(str(step.folder))
        return guess

    def _sparsify(self, run: Run, config: Any) -> Estimate:
        names = patterns(self.architecture, config)
        if config.dtype != "auto":
            self.model.to(DTYPES[config.dtype])
        shape = shape_of(self.model, self.architecture)
        self.run = Run(shape, shape.parameters * shape.itemsize)
        masks = sum(linear.weights for linear in shape.linears if linear.name in names) / 8
        self.disk = self.base_disk = self.run.bytes + masks
        return estimate.sparsify(run, config, pick_device().type != "cpu")

    def _quantize(self, run: Run, config: Any) -> Estimate:
        layers = quantized_layers(self.architecture, config)
        tensors = plan_tensors(self.model, layers, config.format)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        for weight in self.architecture.weights():
            if weight.name in layers:
                weight.replace(layers[weight.name])
        self.run = run._replace(bytes=size, packed=True, gguf=False)
        self.disk = self.base_disk = size  # masks are stored by their exceptions
        return estimate.quantize(run, config, pick_device().type != "cpu")

    def _train(self, run: Run, step: Step) -> Estimate | None:
        config = step.config
        if not self.packed:
            loop.check_kind(self.model, KINDS[config.adapter], step.source)
        names = set(resolve_targets(self.architecture, config.target_modules))
        adapted = [linear for linear in run.shape.linears if linear.name in names]
        make_groups([linear.name for linear in adapted], config.rank_groups, config.search_space or [config.r])
        rank = max(config.search_space) if config.search_space else config.r
        self.disk = 4 * rank * sum(linear.inputs + linear.outputs for linear in adapted)
        data = workload.of_training(config, self.count)
        return data and estimate.train(run, config, adapted, data.lengths, data.evaluation)

    def _search(self, run: Run, config: Any) -> Estimate | None:
        if config.split == "test" or config.data_dir or config.task in (None, "arithmetic"):
            evaluator.search_task(config)
        data = workload.of_task(config, True, self.count)
        return data and estimate.search(run, config, data.lengths, data.generated)
