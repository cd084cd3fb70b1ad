"""Folders of runs as plain data: stages and what they were made from, scores, comparisons, curves, predictions. What
cannot be read (missing, cut off, of another version) becomes a sentence in ``Section.notes``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sqft import artifact
from sqft.errors import SqftError, UsageError
from sqft.measuring.size import serving_bytes as size_of
from sqft.strict import parse_json, parse_lines, read_text

RESULT = "compare.json"  # of a comparison
LOOKS = ("evaluate", "measure")  # stages that look at a folder and make no model
SCORES = ("accuracy", "accuracy_ci95", "perplexity", "perplexity_ci95")
SHARES = ("accuracy", "sparsity", "zeros_kept", "sparsity_kept")  # numbers that lie between 0 and 1


@dataclass
class StageFolder:
    """One stage folder of a section, or (its ``kind`` is 'model') the model that a run started from.

    ``key``: its absolute path, or a hub name; ``source``: the key of what it was made from; ``scores``: what evaluate
    stages found, by task ('' for perplexity alone).
    """

    key: str
    name: str
    folder: Path
    manifest: artifact.Manifest = field(default_factory=lambda: artifact.Manifest("model"))
    source: str = ""
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kind, self.config, self.metrics = self.manifest.stage, self.manifest.config, self.manifest.metrics
        self.numbers = numbers(self.metrics)
        self.is_adapter = os.path.isfile(self.folder / "adapter_config.json")
        self.is_adapted = self.kind == "merge" or (self.kind == "train" and not self.is_adapter)  # one model


@dataclass
class Section:
    """What one FOLDER of the command line holds. ``stages``: none comes before what it was made from; ``evaluations``:
    the stages that looked at one of them."""

    root: Path
    title: str
    stages: list[StageFolder] = field(default_factory=list)
    evaluations: list[StageFolder] = field(default_factory=list)
    comparison: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def stage(self, key: str) -> StageFolder | None:
        return next((stage for stage in self.stages if stage.key == key), None)

    def lineage(self, stage: StageFolder) -> list[StageFolder]:
        """The stage and all that it was made from, the nearest first."""
        found = [stage]
        while (source := self.stage(found[-1].source)) is not None and source not in found:
            found.append(source)
        return found

    @property
    def written(self) -> list[StageFolder]:
        """Stages and evaluations that have a manifest."""
        return [stage for stage in self.stages + self.evaluations if stage.kind != "model"]

    @cached_property
    def methods(self) -> list[dict[str, Any]]:
        """A comparison's rows: numbers, texts, predictions; ``title`` has the sparsity where there are several."""
        rows = self.comparison.get("rows")
        found = [_method(row) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        several = len({row["sparsity"] for row in found if "sparsity" in row}) > 1
        predictions = {stage.key: stage.predictions for stage in self.evaluations}
        for row in found:
            row["title"] = row["method"] + (f", {row['sparsity'] * 100:g} %" if several and "sparsity" in row else "")
            row["task"] = self.comparison.get("task") or "the task"
            row["predictions"] = predictions.get(os.path.abspath(self.root / row.get("evaluation", "")), [])
        return found

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def read(self, path: Path, parse: Callable[[str], Any], default: Any) -> Any:
        """What a file holds, if it is of the type of ``default``; that, with a note, if it cannot be read."""
        try:
            value = parse(read_text(path)) if path.is_file() else default
            return value if isinstance(value, type(default)) else default
        except (OSError, ValueError) as error:
            self.note(f"{path} is corrupt ({error}) and is left out")
            return default

    def read_lines(self, path: Path) -> list[dict[str, Any]]:
        """The objects of a JSON lines file; empty, with a note, if it cannot be read."""
        lines = self.read(path, parse_lines, [])
        return [line for line in lines if isinstance(line, dict)]

    def serving_bytes(self, stage: StageFolder) -> int | None:
        """Bytes of the weights that have to be there to answer: without masks; of an adapter with its base."""
        size = size_of(stage.folder) if stage.folder.exists() else 0
        if size and stage.is_adapter:
            base = next((below for below in self.lineage(stage) if not below.is_adapter), None)
            below = base and self.serving_bytes(base)
            return below and size + below
        return size or None


def numbers(values: Any) -> dict[str, Any]:
    """The finite numbers of what should be a mapping, and of names that end in _ci95 the pairs of them; a share that
    does not lie between 0 and 1 is left out."""
    found: dict[str, Any] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        name = str(key).removesuffix("_ci95")
        pair = name != key
        parts = value if pair and isinstance(value, (list, tuple)) else [value]
        low, high = (0, 1) if name in SHARES else (-1e300, 1e300)
        if len(parts) == 1 + pair and all(type(part) in (int, float) and low <= part <= high for part in parts):
            found[str(key)] = tuple(parts) if pair else value
    return found


def _method(row: dict[str, Any]) -> dict[str, Any]:
    texts = {key: str(row[key]) for key in ("name", "precision", "folder", "evaluation") if row.get(key) is not None}
    merges = row["mergeable"] if isinstance(row.get("mergeable"), bool) else None
    return {**numbers(row), **texts, "mergeable": merges, "method": str(row.get("method") or "?")}


def manifests(root: Path) -> list[tuple[Path, artifact.Manifest | SqftError]]:
    """Every stage folder below ``root`` with its manifest, or what is wrong with it. Raises UsageError if there is none
    and no comparison."""
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}")
    found: list[tuple[Path, artifact.Manifest | SqftError]] = []
    for file in sorted(root.rglob(artifact.MANIFEST)):
        if "/." in f"/{file.relative_to(root).as_posix()}":  # a stage that is being written, or was interrupted
            continue
        try:
            found.append((file.parent, artifact.read_manifest(file.parent)))
        except SqftError as error:
            found.append((file.parent, error))
    if not found and not (root / RESULT).is_file():
        raise UsageError(f"no folder under {root} was written by sqft: give the output folder of 'sqft run', or any "
                         "folder that holds stage folders")  # fmt: skip
    return found


def read_section(root: Path, title: str = "") -> Section:
    """Everything below ``root``. Raises UsageError if there is no stage folder, SqftError if none can be read."""
    section = Section(root, title)
    made: list[StageFolder] = []
    for folder, manifest in manifests(root):
        if isinstance(manifest, SqftError):
            section.note(str(manifest))
            continue
        name = folder.relative_to(root).as_posix() if folder != root else folder.absolute().name
        parent: Any = manifest.parent
        source = _key(artifact.resolve_parent(folder, parent)) if parent and isinstance(parent, str) else ""
        stage = StageFolder(_key(str(folder)), name, folder, manifest, source)
        (section.evaluations if stage.kind in LOOKS else made).append(stage)
    section.comparison = section.read(root / RESULT, partial(parse_json, data=True), {})
    known = {stage.key for stage in made}
    outside = dict.fromkeys(s.source for s in made + section.evaluations if s.source and s.source not in known)
    starts = [
        StageFolder(key, f"{Path(key).name if os.path.isabs(key) else key} (start)", Path(key)) for key in outside
    ]
    section.stages = _in_order(starts + made)
    for evaluation in section.evaluations:
        if evaluation.kind == "evaluate":
            _attach(section, evaluation)
    if not section.stages and not section.methods:
        raise SqftError(section.notes[0] if section.notes else f"{root / RESULT} has no rows: compare again")
    return section


def _key(path: str) -> str:
    return os.path.abspath(path) if os.path.exists(path) else path


def _in_order(stages: list[StageFolder]) -> list[StageFolder]:
    """Depth first: each branch of a tree of runs stays together, and sources come before what was made from them."""
    known = {stage.key for stage in stages}
    waiting = [stage for stage in stages if stage.source not in known] + stages  # the latter: circles
    ordered: list[StageFolder] = []
    while waiting:
        if (stage := waiting.pop(0)) not in ordered:
            ordered.append(stage)
            waiting[:0] = [child for child in stages if child.source == stage.key]
    return ordered


def _attach(section: Section, evaluation: StageFolder) -> None:
    """Adds an evaluation's scores and predictions to the stage that it scored."""
    target = section.stage(evaluation.source)
    if target is None:  # a live model was scored: it has no folder
        target = StageFolder(evaluation.key, evaluation.name, evaluation.folder)
        section.stages.append(target)
    scores = target.scores.setdefault(str(evaluation.metrics.get("task") or ""), {})
    scores |= {name: evaluation.numbers[name] for name in SCORES if name in evaluation.numbers and name not in scores}
    evaluation.predictions = section.read_lines(evaluation.folder / "predictions.jsonl")
    target.predictions = target.predictions or evaluation.predictions
