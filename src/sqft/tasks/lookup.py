"""A task by its name: a built-in one, one of another package (entry points ``sqft.tasks``), a YAML file, or several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sqft.errors import UsageError, did_you_mean
from sqft.registry import TASKS
from sqft.tasks.base import Task
from sqft.tasks.spec import TaskSpec, UnionTask, base_of, load_spec, make_task, shipped_specs, spec_file

UNIONS = {"commonsense": "boolq+piqa+hellaswag+winogrande+arc_easy+arc_challenge+openbookqa"}


def parts_of(name: str) -> list[str]:
    """'piqa+boolq' -> ['piqa', 'boolq']."""
    return UNIONS.get(name, name).split("+")


def get_task(name: str, data_dir: str | Path | None = None) -> Task:
    """A task by name ('gsm8k'), by its YAML file, or several as one ('piqa+boolq').

    ``data_dir``: folder with the tasks' data; without it they are read from the hub. Raises UsageError for an unknown
    name, and for a task that reads no data together with a ``data_dir``.
    """
    parts = parts_of(name)
    if len(parts) > 1:
        return UnionTask(name, tuple(get_task(part, data_dir) for part in parts))
    found = _find(name)
    if isinstance(found, TaskSpec):
        return make_task(replace(found, name=found.name or name), data_dir, f"task {name}: ")
    if isinstance(found, Path):
        return load_spec(found, data_dir)
    if data_dir is not None:
        raise UsageError(f"task {name} makes its problems itself: leave data_dir out")
    return found


def task_files(name: str) -> list[Path]:
    """The YAML files that say what a task is: of 'piqa+mine.yaml' those of both, and of what they build on.

    Raises UsageError as ``get_task``.
    """
    files: list[Path] = []
    for part in parts_of(name):
        found = _find(part)
        while isinstance(found, Path):
            files.append(found)
            found = base_of(found)
    return list(dict.fromkeys(files))


def _find(name: str) -> Any:
    """A ``Task``, a ``TaskSpec``, or the path of a YAML file; built-in tasks are not replaced by others."""
    if name in shipped_specs():
        return spec_file(name)
    if name in TASKS:
        found = TASKS[name]
        return Path(found) if isinstance(found, str) else found
    if Path(name).is_file():
        return Path(name)
    raise UsageError(f"unknown task '{name}': {did_you_mean(name, [*TASKS, *UNIONS, *shipped_specs()])}")
