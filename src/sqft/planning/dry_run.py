"""``--dry-run``: what a recipe would do and about what it would take, without loading or writing anything.

A model skeleton on the ``meta`` device goes through the stages, so that options which do not fit the model (a group
size, a module pattern, an adapter) are the same errors as in the run itself, only earlier.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sqft import artifact
from sqft.adapters.groups import make_groups
from sqft.calibration.data import SUFFIXES, read_records
from sqft.compressing.passes import patterns, quantized_layers
from sqft.errors import SqftError
from sqft.formats.checkpoint import is_packed_folder, plan_tensors
from sqft.keys import folder_key, stage_key
from sqft.measuring.size import human
from sqft.models.dense import DTYPES, locate
from sqft.models.discover import describe, resolve_targets
from sqft.planning.device import measure_device
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


def dry_run(recipe: Recipe, *, model: str | None = None, output: str | None = None) -> dict[str, Any]:
    """Plans a run of the recipe: the model, its parameters and bytes, the steps, their seconds together without those
    that are skipped, the device's speed, and notes. What is not known is None.

    Raises the UsageErrors that the run would, as far as they can be seen from here.
    """
    recipe = recipe.at(model, output)
    source = resolve_model(recipe.model)
    locate(source)
    plan: dict[str, Any] = {"model": recipe.model, "parameters": None, "weight_bytes": None, "speed": None,
                            "factor": FACTOR, "notes": []}  # fmt: skip
    walk = None
    try:
        walk = Walk(source)
        plan |= {"parameters": walk.run.shape.parameters, "weight_bytes": walk.run.bytes, "speed": asdict(walk.speed)}
    except SqftError as error:
        if Path(source).exists():
            raise
        plan["notes"].append(f"model not here: no estimate ({error})")
    keys: dict[str, str] | None = {} if Path(recipe.output).is_dir() else None
    plan["steps"] = [_plan(step, walk, keys) for step in steps(recipe)]
    pending = [step["seconds"] for step in plan["steps"] if step["state"] != "skip"]
    return {**plan, "seconds": None if None in pending else sum(pending)}


def _plan(step: Step, walk: Walk | None, keys: dict[str, str] | None) -> dict[str, Any]:
    """One step: its state is skip, resume or run; its ``note`` says why something is not known."""
    state, note = ("run", "") if keys is None else _state(step, keys)
    if state != "skip":
        artifact.check_output(step.folder, overwrite=True)
        _check_sources(step.config)
    guess = walk and walk.take(step)  # also what is skipped changes the skeleton
    planned = {"name": step.name, "parent": step.source, "output": str(step.folder), "state": state, "note": note,
               "options": changed_options(step.config), "seconds": None, "memory_bytes": None, "disk_bytes": None,
               "flops": None}  # fmt: skip
    if walk is None or state == "skip":
        return planned
    planned["disk_bytes"] = None if step.stage == "evaluate" else walk.disk
    if guess is None:
        return planned | {"note": "; ".join(filter(None, (note, "data not here: no estimate (--data-dir)")))}
    memory = guess.memory + (0 if walk.run.on_gpu else PROCESS)
    return planned | {"seconds": guess.work.seconds(walk.speed), "flops": guess.work.flops, "memory_bytes": memory}


def show(plan: dict[str, Any]) -> None:
    """Prints the steps; then the model, the sum, what it was reckoned with, and how far that may be off."""
    rows = [{**step, "parent": Path(step["parent"]).name, "options": step["options"] or None,
             "state": ": ".join(filter(None, (step["state"], step["note"])))} for step in plan["steps"]]  # fmt: skip
    columns = (Column("stage", "name"), Column("of", "parent"), Column("state", "state"),
               Column("time", "seconds", duration), Column("memory", "memory_bytes", human),
               Column("on disk", "disk_bytes", human),
               Column("options that are not the default", "options", _options))  # fmt: skip
    Table(columns, rows).show()
    print(*plan["notes"], sep="\n", end="\n" if plan["notes"] else "")
    if plan["seconds"] is not None:
        print(f"All that is not skipped: about {duration(plan['seconds'])}")
    if speed := plan["speed"]:
        print(f"{plan['model']}: {plan['parameters'] / 1e6:.1f} M parameters, {human(plan['weight_bytes'])}")
        products, fast, moved = (round(speed[name] / 1e9) for name in ("products", "fast", "moved"))
        print(f"Estimates: FLOPs and bytes over what was measured here ({speed['device']}: {products} GFLOP/s, {fast} "
              f"by the fastest library, {moved} GB/s); on SmolLM2-135M right within a factor of {FACTOR}. Formulas: "
              "docs/recipes.md")  # fmt: skip


def _options(values: dict[str, Any]) -> str:
    texts = {key: ",".join(map(str, v)) if isinstance(v, (list, tuple)) else v for key, v in values.items()}
    return ", ".join(f"{key}={text}" for key, text in texts.items())


def _check_sources(config: Any) -> None:
    """Raises UsageError for a text or data file that is not there."""
    for name in ("calibration", "data", "eval_data", "text"):
        value = getattr(config, name, None)
        if value and value.endswith(SUFFIXES) and not Path(value).is_file():
            read_records(value)


def _state(step: Step, keys: dict[str, str]) -> tuple[str, str]:
    """Skip, resume or run, and a note. ``keys`` gets the step's: keys follow from the parents' keys, so nothing has to
    be there."""
    parent = keys.get(step.source) or folder_key(step.source)
    key = keys[str(step.folder)] = stage_key(step.stage, step.config, parent)
    said: list[str] = []
    if finished(step.folder, key, said.append) is not None:
        return "skip", "unchanged"
    begun = loop.last_checkpoint(loop.work_folder(step.folder, key)) if step.stage == "train" else None
    if begun is not None:
        return "resume", f"from step {begun.name.rsplit('-', 1)[1]}"
    if step.stage == "search" and searching.work_folder(step.folder, step.config, parent).is_dir():
        return "resume", "with what was tried"
    return "run", said[0] if said else "other options or inputs than before" if artifact.is_stage(step.folder) else ""


class Walk:
    """A model without weights that goes through the stages of a run. ``run``: what it is now; ``disk``: bytes of what
    the last stage wrote, ``merged`` of what merging its adapter would write."""

    def __init__(self, source: str) -> None:
        self.model = skeleton(source)
        self.architecture = describe(self.model)
        self.packed = is_packed_folder(source)  # its layers are float ones in the skeleton
        self.count = counter(source)
        shape = shape_of(self.model, self.architecture)
        bits = 4.5 / 8 if self.packed else shape.itemsize
        size = shape.weights * bits + (shape.parameters - shape.weights) * shape.itemsize
        self.speed = measure_device(next(self.model.parameters()).dtype)
        self.run = Run(shape, size, self.packed, locate(source)[1] is not None, on_gpu=torch.accelerator.is_available())
        self.runs = {source: self.run}
        self.disk = self.merged = size

    def take(self, step: Step) -> Estimate | None:
        """What a step takes; None if its data is not here. The model is what the step gives, afterwards."""
        run = self.runs[step.source]
        if step.stage == "evaluate":
            data = of_task(step.config, bool(run.adapted), self.count)
        else:
            data = getattr(self, f"_{step.stage}")(step)
            self.runs[str(step.folder)] = self.run
        return data and STAGES[step.stage].estimator()(run._replace(adapted=self.run.adapted), step.config, data)

    def _sparsify(self, step: Step) -> Workload:
        names = patterns(self.architecture, step.config)
        if step.config.dtype != "auto":
            self.model.to(DTYPES[step.config.dtype])
        shape = shape_of(self.model, self.architecture)
        self.run = Run(shape, shape.parameters * shape.itemsize, on_gpu=self.run.on_gpu)
        masks = sum(linear.weights for linear in shape.linears if linear.name in names) / 8
        self.disk = self.merged = self.run.bytes + masks
        return Workload()

    def _quantize(self, step: Step) -> Workload:
        layers = quantized_layers(self.architecture, step.config)
        tensors = plan_tensors(self.model, layers, step.config.format)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        for weight in self.architecture.weights():
            if weight.name in layers:
                weight.replace(layers[weight.name])
        self.run = self.run._replace(bytes=size, packed=True, gguf=False)
        self.disk = self.merged = size  # masks are stored by their exceptions
        return Workload()

    def _train(self, step: Step) -> Workload | None:
        config = step.config
        if not self.packed:
            loop.check_kind(self.model, KINDS[config.adapter], step.source)
        names = set(resolve_targets(self.architecture, config.target_modules))
        adapted = [linear for linear in self.run.shape.linears if linear.name in names]
        make_groups([linear.name for linear in adapted], config.rank_groups, config.search_space or [config.r])
        rank = max(config.search_space or [config.r])
        self.disk = 4 * rank * sum(linear.inputs + linear.outputs for linear in adapted)
        self.run = self.run._replace(adapted=adapted)
        return of_training(config, self.count)

    def _search(self, step: Step) -> Workload | None:
        config = step.config
        if config.split == "test" or config.data_dir or config.task in (None, "arithmetic"):
            evaluator.search_task(config)
        return of_task(config, True, self.count)

    def _merge(self, step: Step) -> Workload:
        self.disk = self.merged
        return Workload()
