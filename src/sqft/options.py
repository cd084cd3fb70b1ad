"""Options: the fields of config classes, from which flags, YAML and docs are made, and how values become them. Unknown
keys and values of the wrong type are errors that name the near miss (and, in a YAML file, the line)."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
import warnings
from collections.abc import Iterable
from dataclasses import MISSING
from typing import Any, TypeVar

from sqft.errors import UsageError, did_you_mean, shown
from sqft.strict import LARGEST, plain_path

T = TypeVar("T")
COUNT, SEED = "(0, 1e9]", "[0, 4294967295]"  # where numbers may lie; numpy takes no larger seed


class RenamedOption(FutureWarning):
    """An option was given by its old name."""


def option(default: Any = MISSING, help: str = "", choices: Iterable[str] = (), factory: Any = MISSING,
           kind: str = "plain", alias: str = "", within: str = "") -> Any:  # fmt: skip
    """A dataclass field with its help text and, where the set is closed, its choices. ``within``: the interval that a
    number, or each of a list, lies in, "(0, 1]" say (``Options`` checks it).

    ``kind`` says what its value names, for keys (``keys.stage_key``): "plain", "text" (a file or data set), "texts"
    (several), "folder", "task", "data_dir", "ranks", or "machine", which does not change the result. ``alias``: an old
    name, still read.
    """
    metadata = {"help": help, "choices": choices, "kind": kind, "alias": alias, "within": within}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


class Options:
    """What every class of options is: numbers lie where their fields say."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            check_field(spec, getattr(self, spec.name))


def check_field(spec: dataclasses.Field[Any], value: Any) -> None:
    """Raises UsageError for a number, or one of a list, that is not where the field says."""
    if (within := spec.metadata.get("within")) and value is not None:
        for number in value if isinstance(value, list) else [value]:
            check_within(spec.name, number, within)


def check_within(name: str, value: float, within: str) -> None:
    """Raises UsageError for a number that is not in an interval such as "(0, 1]", so for nan too."""
    low, high = map(float, within[1:-1].split(","))
    if not (value > low or (within[0] == "[" and value == low)):
        raise UsageError(
            f"{name} is {value}: it has to be {'at least' if within[0] == '[' else 'greater than'} {low:g}"
        )
    if value > high or (within[-1] == ")" and value == high):
        raise UsageError(
            f"{name} is {value}: it has to be {'at most' if within[-1] == ']' else 'less than'} {high:.10g}"
        )


def from_dict(cls: type[T], values: dict[str, Any], where: str = "", lines: dict[str, int] | None = None) -> T:
    """Builds a config from plain values, strictly. ``lines`` maps a key to its line for messages."""
    hints = typing.get_type_hints(cls)
    aliases = {spec.metadata["alias"]: spec.name for spec in dataclasses.fields(cls) if spec.metadata.get("alias")}  # pyright: ignore
    clean = {}
    for key, value in values.items():
        at = f"{where}:{lines[key]}: " if lines and key in lines else f"{where}: " if where else ""
        if key in aliases:
            warnings.warn(f"{at}'{key}' is now called '{aliases[key]}'", RenamedOption, stacklevel=2)
            key = aliases[key]
        if key not in hints:
            raise UsageError(f"{at}unknown option '{shown(key)}' of {stage_name(cls)}: {did_you_mean(key, hints)}")
        spec = next(f for f in dataclasses.fields(cls) if f.name == key)  # pyright: ignore[reportArgumentType]
        try:
            clean[key] = coerce(value, hints[key])
            check_field(spec, clean[key])
        except ValueError as error:
            raise UsageError(f"{at}{key}: {error}") from None
        except UsageError as error:
            raise UsageError(f"{at}{error}") from None
        if spec.metadata.get("kind", "plain") not in ("plain", "machine") and not plain_path(str(clean[key])):
            raise UsageError(f"{at}{key} is {shown(repr(clean[key]))}, which is no path or name")
        choices = spec.metadata.get("choices")
        if choices and clean[key] is not None and clean[key] not in choices:
            what = getattr(choices, "kind", key)
            near = did_you_mean(str(clean[key]), choices)
            raise UsageError(f"{at}unknown {what} '{shown(clean[key])}': {near}")
    try:
        return cls(**clean)
    except UsageError as error:
        raise UsageError(f"{where}: {error}" if where else str(error)) from None


def coerce(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint``; strings are parsed (they may come from a flag). Raises ValueError."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = next(a for a in typing.get_args(hint) if a is not type(None))
        return None if value in (None, "none") else coerce(value, inner)
    origin = typing.get_origin(hint) or hint
    if origin is list and isinstance(value, (list, tuple, str)):
        items = value.split(",") if isinstance(value, str) else [str(v) for v in value]
        (kind,) = typing.get_args(hint) or (str,)
        return [coerce(piece, kind) for item in items for piece in item.split(",") if piece]
    if origin is dict and isinstance(value, dict):
        return {str(k): coerce(v, float) for k, v in value.items()}
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _number(value, hint)
    raise ValueError(f"{shown(repr(value))} is not of type {getattr(hint, '__name__', hint)}")


def _number(value: int | float | str, hint: type) -> int | float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"'{shown(value)}' is not a number") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{shown(value)} is not a finite number")
    if abs(number) >= LARGEST:
        raise ValueError(f"{shown(value)} is too large a number")
    if hint is int and number != int(number):
        raise ValueError(f"{value} is not a whole number")
    return value if hint is int and isinstance(value, int) else hint(number)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values, in field order, as they go into YAML and manifests."""
    return dataclasses.asdict(config)


def recorded(config: Any) -> dict[str, Any]:
    """The options as they go into a manifest: without the passwords of URLs."""
    values = {} if config is None else to_dict(config)
    return {key: without_password(value) if isinstance(value, str) else value for key, value in values.items()}


def without_password(text: str) -> str:
    """'postgresql://me:secret@host/db' -> 'postgresql://me:***@host/db'; also of '?password=secret'."""
    text = re.sub(r"(?<=://)([^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"(?i)(?<=[?&])(\w*(?:password|passwd|pwd)=)[^&\s]*", r"\1***", text)


def stage_name(cls: type) -> str:
    """SparsifyConfig -> 'sparsify'."""
    return cls.__name__.removesuffix("Config").lower()


def parse_pattern(pattern: str) -> tuple[int, int]:
    """'2:4' -> (2, 4): keep N of every M neighbours along the input."""
    keep, _, group = pattern.partition(":")
    if not (keep.isdigit() and group.isdigit() and 0 < int(keep) < int(group)):
        raise UsageError(f"pattern '{pattern}' is not N:M with 0 < N < M, e.g. 2:4")
    return int(keep), int(group)


def parse_size(size: str) -> int:
    """'5GB' -> bytes (decimal units)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = size[:-2], size[-2:].upper()
    try:
        value = int(float(number) * units[unit])
    except (KeyError, ValueError):
        raise UsageError(f"'{size}' is not a size: write e.g. 500MB or 5GB") from None
    if value <= 0:
        raise UsageError(f"size '{size}' has to be greater than 0")
    return value
