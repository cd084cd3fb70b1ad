"""The command line that makes a stage folder again, from its manifest."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqft.config import SparsifyConfig
from sqft.errors import UsageError
from sqft.options import from_dict
from sqft.reporting.collect import Section, StageFolder
from sqft.stages import STAGES

LIVE = {"calibration": "calibration tokens", "ranks": "ranks"}  # options that can be objects of a program


class Command(NamedTuple):
    """``line`` for a shell, or empty; ``note`` says what of the stage a command line cannot say."""

    line: str
    note: str = ""


def changed_options(config: Any) -> dict[str, Any]:
    """The options of a config that are not the default's."""
    plain = {spec.name: spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
             for spec in dataclasses.fields(config)}  # fmt: skip
    return {name: value for name, default in plain.items() if (value := getattr(config, name)) != default}


def flags(config: Any) -> list[str]:
    """The flags of a config, only of options that differ from their defaults; parsed, they give it back."""
    words: list[str] = []
    for name, value in changed_options(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, dict):
            words += [flag, *(f"{key}={number}" for key, number in value.items())]
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
            # A value that begins with a dash would be taken for a flag.
            words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return words


def command(stage: str, source: str, out: str, config: Mapping[str, Any]) -> Command:
    """``sqft STAGE SOURCE OUT --flag ...``. A config of another version of sqft gives a note instead of a line."""
    if stage not in STAGES:
        return Command("", f"{out}: written from Python")
    values = {name: value for name, value in config.items() if name != "first" and not _is_live(name, value)}
    given = [LIVE[name] for name, value in config.items() if _is_live(name, value)]
    if stage == "train" and not (values.get("task") or values.get("data")):
        given.append("training examples")
    note = f"{out}: the {', '.join(given)} were given from Python" if given else ""
    try:
        words = flags(from_dict(STAGES[stage].config, values))
        if config.get("first") is not None:
            first = {name: value for name, value in config["first"].items() if not _is_live(name, value)}
            stage, words = "sparsify", [*flags(from_dict(SparsifyConfig, first)), "--then", "quantize", *words]
    except (UsageError, TypeError, AttributeError, OverflowError) as error:
        return Command("", f"{out}: its options are those of another version of sqft ({error})")
    places = {"evaluate": [source, "--out", out], "measure": [source]}.get(stage, [source, out])
    return Command(shlex.join(["sqft", stage, *places, *words]), note)


def _is_live(name: str, value: Any) -> bool:
    """Whether an option was an object of a program, which no flag can say."""
    return (name == "calibration" and str(value).startswith("tokens:")) or (name == "ranks" and isinstance(value, dict))


def section_commands(section: Section) -> list[Command]:
    """A command for each stage folder, in an order in which they can be run."""
    return [_stage_command(section, stage) for stage in section.written]


def _stage_command(section: Section, stage: StageFolder) -> Command:
    source = section.stage(stage.source)
    path = str(source.folder) if source is not None else stage.source
    if not path or stage.source == stage.key:
        return Command("", f"{stage.folder}: made from Python of a model that is in no folder")
    return command(stage.kind, path, str(stage.folder), stage.config)
