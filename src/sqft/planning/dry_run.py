"""``--dry-run``: what a recipe would do and about what it would take, without loading or writing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqft import artifact
from sqft.calibration.data import SUFFIXES, read_records
from sqft.errors import SqftError
from sqft.flags import changed_options
from sqft.keys import folder_key, sources, stage_key
from sqft.measuring.size import human
from sqft.models.dense import locate
from sqft.outputs import work_folder
from sqft.planning.walk import Walk
from sqft.recipe import Recipe, Step, finished, resolve_model, steps
from sqft.reporting.tables import Column, Table, duration
from sqft.searching import stage as searching
from sqft.training.callbacks import last_checkpoint


def dry_run(recipe: Recipe, *, model: str | None = None, output: str | None = None) -> dict[str, Any]:
    """Plans a run of the recipe: the model, its parameters and bytes, the steps, their seconds together without those
    that are skipped, the device's speed, and notes. What is not known is None.

    Raises the UsageErrors that the run would, as far as they can be seen from here.
    """
    recipe = recipe.at(model, output)
    source = resolve_model(recipe.model)
    locate(source)
    plan: dict[str, Any] = {"model": recipe.model, "parameters": None, "weight_bytes": None, "speed": None,
                            "factor": 2, "notes": []}  # fmt: skip
    walk = None
    try:
        walk = Walk(source)
        shape = walk.shapes[source]
        plan |= {"parameters": shape.parameters, "weight_bytes": shape.bytes, "speed": walk.speed._asdict()}
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
        mixed = sources(step.config.calibration) if hasattr(step.config, "calibration") else []
        texts = [getattr(step.config, name, None) or "" for name in ("data", "eval_data", "text")]
        for text in (*texts, *(name for name, _ in mixed)):
            if text.endswith(SUFFIXES) and not Path(text).is_file():
                read_records(text)  # raises
    needs = walk.take(step) if walk else {}  # also what is skipped changes the skeleton
    if state == "skip":
        needs = {}
    return {"name": step.name, "parent": step.source, "output": str(step.folder), "state": state, "note": note,
            "options": changed_options(step.config), "seconds": None, "memory_bytes": None, "disk_bytes": None,
            "flops": None, **needs}  # fmt: skip


def _state(step: Step, keys: dict[str, str]) -> tuple[str, str]:
    """Skip, resume or run, and a note. ``keys`` gets the step's: keys follow from the parents' keys, so nothing has to
    be there."""
    parent = keys.get(step.source) or folder_key(step.source)
    key = keys[str(step.folder)] = stage_key(step.stage, step.config, parent)
    said: list[str] = []
    if finished(step.folder, key, said.append) is not None:
        return "skip", "unchanged"
    begun = last_checkpoint(work_folder(step.folder, "training", key)) if step.stage == "train" else None
    if begun is not None:
        return "resume", f"from step {begun.name.rsplit('-', 1)[1]}"
    if step.stage == "search" and searching.trials_folder(step.folder, step.config, parent).is_dir():
        return "resume", "with what was tried"
    return "run", said[0] if said else "other options or inputs than before" if artifact.is_stage(step.folder) else ""


def show(plan: dict[str, Any]) -> None:
    """Prints the steps; then the model, the sum, what it was reckoned with, and how far that may be off."""
    rows = [{**step, "parent": Path(step["parent"]).name,
             "options": ", ".join(f"{key}={value}" for key, value in step["options"].items()) or None,
             "state": ": ".join(filter(None, (step["state"], step["note"])))} for step in plan["steps"]]  # fmt: skip
    Table((Column("stage", "name"), Column("of", "parent"), Column("state", "state"),
           Column("time", "seconds", duration), Column("memory", "memory_bytes", human),
           Column("on disk", "disk_bytes", human), Column("options that are not the default", "options")),
          rows).show()  # fmt: skip
    for note in plan["notes"]:
        print(note)
    if plan["seconds"] is not None:
        print(f"All that is not skipped: about {duration(plan['seconds'])}")
    if speed := plan["speed"]:
        print(f"{plan['model']}: {plan['parameters'] / 1e6:.1f} M parameters, {human(plan['weight_bytes'])}")
        print(f"Estimates: FLOPs and bytes over what was measured here ({speed['device']}: "
              f"{speed['products'] / 1e9:.0f} GFLOP/s, {speed['moved'] / 1e9:.0f} GB/s); on SmolLM2-135M right within "
              f"a factor of {plan['factor']}. Formulas: docs/recipes.md")  # fmt: skip
