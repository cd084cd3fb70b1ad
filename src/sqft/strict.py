"""JSON and YAML that a stranger may have written: read whole, within limits, or refused in one line.

A file that is no regular one, or too long, is not read; neither are more values, digits or levels than a result of
sqft's could need, nor names that are given twice. YAML has text, numbers, true, false, null, lists and mappings: no
tags, dates or references that expand without end.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sqft.errors import UsageError, shown

JSON_BYTES, YAML_BYTES = 64 * 2**20, 2**17  # of YAML 100 kB take two seconds
VALUES, DEPTH, DIGITS = 4_000_000, 32, 40
YAML_VALUES = 100_000  # with what references stand for
LARGEST = 2**63
_NAME = re.compile(r"(?!\.\.?(?:/|$))[^/\\\0]+(?:/(?!\.\.?(?:/|$))[^/\\\0]+)*")
_TAG = "tag:yaml.org,2002:"
Lines = dict[tuple[str, ...], int]


def read_text(path: Path, most: int = JSON_BYTES) -> str:
    """A text file. Raises OSError, or ValueError saying in one line why it is not read."""
    there = path.stat()
    if not stat.S_ISREG(there.st_mode):  # to open a pipe is to wait
        raise ValueError("it is not a file")
    with path.open("rb") as stream:
        data = stream.read(min(there.st_size, most) + 1)  # room is made for as much as is asked for
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return data.decode("utf-8")


def read_json(path: Path, data: bool = False) -> Any:
    """``parse_json`` of a file. Raises OSError, or ValueError."""
    return parse_json(read_text(path), data)


def read_object(path: Path, data: bool = False) -> dict[str, Any]:
    """``read_json`` of a file that holds an object. Raises OSError, or ValueError."""
    values = read_json(path, data)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values


def parse_json(text: str, data: bool = False, nan: bool = True, most: int = VALUES) -> Any:
    """What a JSON text of at most so many values says. ``data``: of records and measurements, in which NaN (if ``nan``)
    is a number, a search space may have a size of 100 digits, and the last of equal names counts, as Python has it.
    Raises ValueError saying in one line what is wrong."""
    opened = text.count("[") + text.count("{")
    if opened + text.count(",") > most:
        raise ValueError(f"it has more than {most:,} values")
    hooks = {} if data else {"object_pairs_hook": _once, "parse_constant": _finite, "parse_float": _finite,
                             "parse_int": _integer}  # fmt: skip
    if not nan:
        hooks["parse_constant"] = _finite
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEPTH} deep") from None
    if opened > DEPTH:
        _check_depth(value)
    return value


def parse_lines(text: str) -> list[Any]:
    """``parse_json`` of every line that is not blank, as data. Raises ValueError."""
    return [parse_json(line, data=True) for line in text.split("\n") if line.strip()]


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number has {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{shown(text)} is no finite number")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{shown(twice)}' is given twice")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        level = [one for values in inner for one in values if isinstance(one, (dict, list))]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEPTH} deep")


def plain_name(name: Any) -> bool:
    """Whether it names a file in or below a folder: relative, without '..'."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def plain_path(path: str) -> bool:
    """Whether the system can look a path up: it is no longer than one can be, and has no NUL or half of a character."""
    try:
        data = path.encode()
    except UnicodeEncodeError:
        return False
    return b"\0" not in data and len(data) <= 1024 and all(len(part) <= 255 for part in data.split(b"/"))


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """A YAML mapping and the line of each key, by the key's path; keys are texts. Raises UsageError with the line."""
    try:
        text = read_text(path, YAML_BYTES)
        node = yaml.SafeLoader(text).get_single_node()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    except RecursionError:
        raise UsageError(f"{path}: it is nested more than {DEPTH} deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UsageError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path}: it has to be a mapping, lines of 'name: value'")
    _check_nodes(node, path)
    lines: Lines = {}
    return _value(node, path, (), lines), lines


def _check_nodes(root: yaml.Node, path: Path) -> None:
    """Before anything is made of them: what is wrong with a value, and how many there are, references followed."""
    level, count = [root], 0
    for _ in range(DEPTH + 1):
        count += len(level)
        if count > YAML_VALUES:
            raise UsageError(f"{path}: its references (*name) stand for more than {YAML_VALUES:,} values")
        level = list(_inner(level, YAML_VALUES))
        if not level:
            return
    raise UsageError(f"{path}:{level[0].start_mark.line + 1}: it is nested more than {DEPTH} deep")


def _inner(level: list[yaml.Node], most: int) -> Iterator[yaml.Node]:
    count = 0
    for node in level:
        if isinstance(node, yaml.CollectionNode):
            for one in node.value:
                count += 1
                if count > most + 1:
                    return
                yield from one if isinstance(one, tuple) else (one,)


def _value(node: yaml.Node, path: Path, place: tuple[str, ...], lines: Lines) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [_value(item, path, place, {}) for item in node.value]
    if not isinstance(node, yaml.MappingNode) or node.tag != f"{_TAG}map":
        raise UsageError(f"{_at(node, path)}: a value with a tag ({shown(node.tag)}) is not read: write it without")
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key, inner in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"{_at(key, path)}: a key has to be a text")
        if key.tag == f"{_TAG}merge":
            for other in inner.value if isinstance(inner, yaml.SequenceNode) else [inner]:
                if not isinstance(other, yaml.MappingNode):
                    raise UsageError(f"{_at(key, path)}: '<<' takes mappings")
                merged = {**_value(other, path, place, lines), **merged}
            continue
        if key.value in own:
            raise UsageError(f"{_at(key, path)}: '{shown(key.value)}' is given twice")
        lines[(*place, key.value)] = key.start_mark.line + 1
        own[key.value] = _value(inner, path, (*place, key.value), lines)
    return {**merged, **own}


def _scalar(node: yaml.ScalarNode, path: Path) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    if kind == "str":
        return text
    if kind in ("int", "float") and len(text) > DIGITS:
        raise UsageError(f"{_at(node, path)}: a number has {len(text):,} digits")
    construct = {"null": yaml.SafeLoader.construct_yaml_null, "bool": yaml.SafeLoader.construct_yaml_bool,
                 "int": yaml.SafeLoader.construct_yaml_int, "float": yaml.SafeLoader.construct_yaml_float}  # fmt: skip
    if kind not in construct:
        raise UsageError(f"{_at(node, path)}: '{shown(text)}' is a {shown(kind)}, which is not read: put it in quotes")
    try:
        value = construct[kind](yaml.SafeLoader(""), node)
    except (ValueError, KeyError, IndexError):
        raise UsageError(f"{_at(node, path)}: '{shown(text)}' is not a {shown(kind)}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{_at(node, path)}: '{shown(text)}' is no finite number")
    return value


def _at(node: yaml.Node, path: Path) -> str:
    return f"{path}:{node.start_mark.line + 1}"
