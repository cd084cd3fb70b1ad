"""The command line that makes a stage folder again, from its manifest."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from sqft.config import SHARED, SparsifyConfig
from sqft.errors import UsageError
from sqft.flags import written_flags
from sqft.options import from_dict
from sqft.reporting.collect import Section
from sqft.stages import STAGES


def command(stage: str, source: str, out: str, config: Mapping[str, Any]) -> str:
    """``sqft STAGE SOURCE OUT --flag ...``, with a comment on what was an object of a program, which no flag can say; a
    comment alone if nothing can be said."""
    if stage not in STAGES or not source or source == out:
        return _comment(f"{out}: written from Python")
    try:
        words = written_flags(own := from_dict(STAGES[stage].config, _sayable(config)))
        if config.get("first") is not None:
            stage, first = "sparsify", from_dict(SparsifyConfig, _sayable(config["first"]))
            words = [*written_flags(first), "--then", "quantize", *written_flags(own, first, SHARED)]
    except (UsageError, TypeError, AttributeError, OverflowError) as error:
        return _comment(f"{out}: its options are those of another version of sqft ({error})")
    places = {"evaluate": [source, "--out", out], "measure": [source]}.get(stage, [source, out])
    live = ["data"] if stage == "train" and not (config.get("task") or config.get("data")) else []
    live += sorted(config.keys() - _sayable(config).keys() - {"first"})
    line = shlex.join(["sqft", stage, *places, *words])
    return line + ("  " + _comment(f"given from Python: {', '.join(live)}") if live else "")


def _sayable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that flags can say: not calibration tokens or ranks that were given from Python."""
    live = {"calibration": str(config.get("calibration")).startswith("tokens:"), "first": True,
            "ranks": isinstance(config.get("ranks"), dict)}  # fmt: skip
    return {name: value for name, value in config.items() if not live.get(name)}


def _comment(text: str) -> str:
    return "# " + " ".join(text.split())


def section_commands(section: Section) -> str:
    """A line for each stage folder, in an order in which they can be run."""
    known = {stage.key: str(stage.folder) for stage in section.stages}
    return "\n".join(command(stage.kind, known.get(stage.source, stage.source), str(stage.folder), stage.config)
                     for stage in section.written)  # fmt: skip
