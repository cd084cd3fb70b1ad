"""A task by its name: a built-in one, one of another package (entry points ``sqft.tasks``), a YAML file, or several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sqft.errors import UsageError, did_you_mean
from sqft.registry import TASKS
from sqft.tasks.base import Task
from sqft.tasks.spec import TaskSpec, UnionTask, load_spec, make_task, shipped_file, shipped_specs

UNIONS = {"commonsense": "boolq+piqa+hellaswag+winogrande+arc_easy+arc_challenge+openbookqa"}


def parts_of(name: str) -> list[str]:
    """'piqa+boolq' -> ['piqa', 'boolq']."""
    return UNIONS.get(name, name).split("+")


def is_task(name: str) -> bool:
    """Whether a source of text is a task, by its name or as a YAML file."""
    return name in TASKS or name in UNIONS or name in shipped_specs() or name.endswith((".yaml", ".yml"))


def get_task(name: str, data_dir: str | Path | None = None) -> Task:
    """A task by name ('gsm8k'), by its YAML file, or several as one ('piqa+boolq').

    ``data_dir``: folder with the tasks' data; without it they are read from the hub. Raises UsageError for an unknown
    name, and for a task that reads no data together with a ``data_dir``.
    """
    parts = parts_of(name)
    if len(parts) > 1:
        return UnionTask(name, tuple(get_task(part, data_dir) for part in parts))
    if name in shipped_specs():  # others do not replace what comes with sqft
        return load_spec(shipped_file(name), data_dir)
    if name not in TASKS:
        if not Path(name).is_file():
            raise UsageError(f"unknown task '{name}': {did_you_mean(name, [*TASKS, *UNIONS, *shipped_specs()])}")
        return load_spec(Path(name), data_dir)
    found = TASKS[name]
    if isinstance(found, (str, Path)):
        return load_spec(Path(found), data_dir)
    if isinstance(found, TaskSpec):
        return make_task(replace(found, name=found.name or name), data_dir, f"task {name}: ")
    if data_dir is not None:
        raise UsageError(f"task {name} makes its problems itself: leave data_dir out")
    return found
