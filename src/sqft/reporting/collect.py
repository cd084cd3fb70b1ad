"""Folders of runs as plain data: stages and what they were made from, scores, comparisons, curves, predictions.

Everything read here was written by some earlier process and may be missing, cut off or of another version: what cannot
be read becomes a sentence in ``Section.notes``, and the report goes on without it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqft import artifact
from sqft.errors import SqftError, UsageError
from sqft.folders import ADAPTER_CONFIG
from sqft.measuring.size import serving_bytes as size_of
from sqft.reporting.comparison_table import RESULT

LOOKS = ("evaluate", "measure")  # stages that look at a folder and make no model
SCORES = ("accuracy", "accuracy_ci95", "perplexity", "perplexity_ci95", "problems")
ADAPTERS = ("search", "extract")  # their manifest's parent is the base; the adapter they came from is in the metrics


@dataclass
class Stage:
    """One stage folder of a section, or (``manifest`` is None) the model that a run started from.

    ``key`` is what other stages name it by: its absolute path, or a hub name. ``source`` is the key of what it was
    made from. ``scores`` maps a task (or '' for perplexity alone) to what evaluate stages found.
    """

    key: str
    name: str
    folder: Path
    manifest: artifact.Manifest | None = None
    source: str = ""
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return "model" if self.manifest is None else self.manifest.stage

    @property
    def metrics(self) -> dict[str, Any]:
        return {} if self.manifest is None else self.manifest.metrics

    @property
    def config(self) -> dict[str, Any]:
        return {} if self.manifest is None else self.manifest.config


@dataclass
class Section:
    """What one FOLDER of the command line holds. ``stages`` are in order: none comes before what it was made from;
    ``evaluations`` are those that looked at one of them."""

    root: Path
    title: str
    stages: list[Stage] = field(default_factory=list)
    evaluations: list[Stage] = field(default_factory=list)
    comparison: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def stage(self, key: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.key == key), None)

    def lineage(self, stage: Stage) -> list[Stage]:
        """The stage and all that it was made from, the nearest first."""
        found = [stage]
        while (source := self.stage(found[-1].source)) is not None and source not in found:
            found.append(source)
        return found

    @property
    def methods(self) -> list[dict[str, Any]]:
        """Rows of a comparison; empty for other folders."""
        rows = self.comparison.get("rows")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def finite(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e300:  # a huge int, say
        return None
    return value if math.isfinite(value) else None


def number(values: Any, name: str) -> float | None:
    """A finite number of a mapping, else None."""
    return finite(values.get(name)) if isinstance(values, dict) else None


def interval(values: Any, name: str) -> tuple[float, float] | None:
    """A pair of finite numbers of a mapping, else None."""
    pair = values.get(name) if isinstance(values, dict) else None
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return None
    low, high = map(finite, pair)
    return None if low is None or high is None else (low, high)


def read_section(root: Path, title: str) -> Section:
    """Everything below ``root``. Raises UsageError if there is no stage folder, SqftError if none can be read."""
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}")
    section = Section(root, title)
    found = list(_read_stages(section))
    section.comparison = _read_comparison(section)
    if not found and not section.methods:
        if section.notes:
            raise SqftError(section.notes[0])
        raise UsageError(f"no folder under {root} was written by sqft: give the output folder of 'sqft run', or any "
                         "folder that holds stage folders")  # fmt: skip
    section.evaluations = [stage for stage in found if stage.kind in LOOKS]
    section.stages = _in_order([stage for stage in found if stage.kind not in LOOKS])
    _add_models(section)
    for evaluation in section.evaluations:
        if evaluation.kind == "evaluate":
            _attach(section, evaluation)
    return section


def _read_stages(section: Section) -> Iterator[Stage]:
    for file in sorted(section.root.rglob(artifact.MANIFEST)):
        relative = file.parent.relative_to(section.root)
        if any(part.startswith(".") for part in relative.parts):
            continue  # a stage that is being written, or was interrupted
        try:
            manifest = artifact.read_manifest(file.parent)
            kinds = (type(manifest.stage), type(manifest.metrics), type(manifest.config))
            if kinds != (str, dict, dict):
                raise SqftError(f"{file} is corrupt (stage, metrics or config is of a wrong type): run the stage again")
        except SqftError as error:
            section.notes.append(str(error))
            continue
        except TypeError as error:  # a field of a wrong type
            section.notes.append(f"{file} is corrupt ({error}): run the stage again")
            continue
        name = relative.as_posix() if relative.parts else file.parent.absolute().name
        yield Stage(_key(str(file.parent)), name, file.parent, manifest, _source(file.parent, manifest))


def _key(path: str) -> str:
    return os.path.abspath(path) if os.path.exists(path) else path


def _source(folder: Path, manifest: artifact.Manifest) -> str:
    parent: Any = manifest.parent
    if manifest.stage in ADAPTERS:
        parent = manifest.metrics.get("super_adapter") or parent
    if not isinstance(parent, str) or not parent:
        return ""
    return _key(artifact.resolve_parent(folder, parent))


def _in_order(stages: list[Stage]) -> list[Stage]:
    """Depth first: each branch of a tree of runs stays together, and sources come before what was made from them."""
    known = {stage.key for stage in stages}
    ordered: list[Stage] = []

    def visit(stage: Stage) -> None:
        if stage in ordered:
            return
        ordered.append(stage)
        for child in stages:
            if child.source == stage.key:
                visit(child)

    for stage in [stage for stage in stages if stage.source not in known] + stages:  # the latter: circles
        visit(stage)
    return ordered


def _add_models(section: Section) -> None:
    """Puts the models that stages or evaluations name, but that are no stages, before the first stage from them."""
    for stage in [*section.stages, *section.evaluations]:
        key = stage.source
        if not key or section.stage(key) is not None:
            continue
        place = section.stages.index(stage) if stage in section.stages else 0
        name = Path(key).name if os.path.isabs(key) or key.startswith(".") else key
        section.stages.insert(place, Stage(key, name, Path(key)))


def _attach(section: Section, evaluation: Stage) -> None:
    """Adds an evaluation's scores and predictions to the stage that it scored."""
    target = section.stage(evaluation.source)
    if target is None:  # a live model was scored: it has no folder
        target = Stage(evaluation.key, evaluation.name, evaluation.folder, None)
        section.stages.append(target)
    task = str(evaluation.metrics.get("task") or "")
    scores = target.scores.setdefault(task, {})
    for name in (*SCORES, "split"):
        if scores.get(name) is None:
            scores[name] = evaluation.metrics.get(name)
    evaluation.predictions = read_lines(section, evaluation.folder / "predictions.jsonl")
    target.predictions = target.predictions or evaluation.predictions


def _read_comparison(section: Section) -> dict[str, Any]:
    value = read_json(section, section.root / RESULT)
    return value if isinstance(value, dict) else {}


def read_json(section: Section, path: Path) -> Any:
    """A JSON file, or None, with a note if it is there but cannot be read."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        section.notes.append(f"{path} is corrupt ({error}) and is left out")
        return None


def read_lines(section: Section, path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; empty, with a note, if it cannot be read."""
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        section.notes.append(f"{path} is corrupt ({error}) and is left out")
        return []
    return [line for line in lines if isinstance(line, dict)]


def serving_bytes(stage: Stage, section: Section) -> int | None:
    """Bytes of the weights that have to be there to answer: without masks; of an adapter with its base."""
    path = stage.folder
    if not path.exists() or (stage.manifest is None and stage.key in {e.key for e in section.evaluations}):
        return None
    size = size_of(path)
    if (path / ADAPTER_CONFIG).is_file():
        base = next((s for s in section.lineage(stage)[1:] if not (s.folder / ADAPTER_CONFIG).is_file()), None)
        below = serving_bytes(base, section) if base is not None else None
        return None if below is None else size + below
    return size or None
