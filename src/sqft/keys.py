"""What identifies a result: the hash of its stage, of what its options name, and of what it was made from.

An option's kind (``config.option``) says what its value names: the contents of a file, a folder's key, a task's files;
only plain values count as they are written, and options about the machine do not count at all. So a run that is moved
keeps its keys, and a file that is edited changes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqft.errors import SqftError, UsageError
from sqft.strict import parse_json, read_text

MANIFEST = "sqft.json"
MASKS = Path("masks") / "masks.safetensors"  # a folder of its own: loaders that read *.safetensors must not find it
FRACTIONS = Path("fractions") / "fractions.safetensors"  # as the masks
FORMAT = 3
TEXT_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
YAML_SUFFIXES = (".yaml", ".yml")
_MODEL_SUFFIXES = (".json", ".jinja", ".safetensors", ".gguf", ".model", ".txt")


def stage_key(stage: str, config: Any, parent_key: str, given: Mapping[str, Any] | None = None) -> str:
    """Hash of what determines a stage's result. Equal key, equal result: ``run`` skips such a stage.

    Args:
        config: the stage's options, a config dataclass, or None.
        parent_key: of what the stage was made from.
        given: what was passed besides: plain values or configs.
    """
    others = {k: _identity(v) if dataclasses.is_dataclass(v) else v for k, v in (given or {}).items()}
    text = json.dumps([FORMAT, stage, _identity(config), others, parent_key], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    kinds = {spec.name: spec.metadata.get("kind", "plain") for spec in dataclasses.fields(config)}
    values = dataclasses.asdict(config)
    return {name: _NAMED[kind](values[name]) for name, kind in kinds.items() if kind in _NAMED}


def _contents(value: Any, suffixes: tuple[str, ...]) -> Any:
    """The hash of the file that a value names, if it names one; else the value ('builtin', a heuristic, a hub name)."""
    if isinstance(value, str) and value.endswith(suffixes) and Path(value).is_file():
        return {"sha256": file_digest(Path(value))}
    return value


def sources(text: str) -> list[tuple[str, float]]:
    """'gsm8k=1+c4.jsonl=3' -> [('gsm8k', 1.0), ('c4.jsonl', 3.0)]; a name without a weight, or of a file, has 1. Raises
    UsageError for a part without a name, and if all weights are 0."""
    if Path(text).is_file():
        return [(text, 1.0)]
    parts = [re.fullmatch(r"(.+?)(?:=(\d+(?:\.\d+)?))?", part, re.S) for part in text.split("+")]
    found = [(part[1], float(part[2] or 1)) for part in parts if part]
    if len(found) < len(parts) or not any(weight for _, weight in found):
        raise UsageError(f"calibration '{text}' names no text: write one, or several as in gsm8k=1+c4.jsonl=3")
    return found


def _texts(value: str) -> Any:
    """Of one source its contents, of several of each its weight too."""
    parts = [(_contents(name, (*TEXT_SUFFIXES, *YAML_SUFFIXES)), weight) for name, weight in sources(value)]
    return parts[0][0] if len(parts) == 1 else parts


def _task(value: Any) -> Any:
    """Of each part of 'piqa+mine.yaml': its name, or its file's contents."""
    return value and [_contents(part, YAML_SUFFIXES) for part in value.split("+")]


def _data_dir(value: Any) -> Any:
    if not value:
        return value
    files = (file for depth in ("*", "*/*", "*/*/*") for file in Path(value).glob(f"{depth}.json*"))
    return sorted((file.relative_to(value).as_posix(), file_digest(file)) for file in files if file.is_file())


# Of each kind of option what its value names; kinds that are missing here ("machine") do not change a result.
_NAMED = {
    "plain": lambda value: value,
    "text": lambda value: _contents(value, TEXT_SUFFIXES),
    "texts": _texts,
    "ranks": lambda value: _contents(value, (*YAML_SUFFIXES, ".json")),
    "folder": lambda value: value and folder_key(value),
    "task": _task,
    "data_dir": _data_dir,
}


def folder_key(folder: str | Path) -> str:
    """A stage folder's key; for any other model folder or file, the hash of its contents; for a hub name, the name."""
    path = Path(folder)
    if (path / MANIFEST).is_file():
        return read_values(path)["key"]
    if not path.exists():
        return hashlib.sha256(str(folder).encode()).hexdigest()
    beside = (path / file for file in (MASKS, FRACTIONS))
    files = sorted([*path.iterdir(), *(file for file in beside if file.is_file())]) if path.is_dir() else [path]
    return contents_key({file.name: file_digest(file)
                         for file in files if file.suffix in _MODEL_SUFFIXES and file.is_file()})  # fmt: skip


def contents_key(digests: Mapping[str, str]) -> str:
    """The key of files, by their names and hashes."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def read_values(folder: Path) -> dict[str, Any]:
    """What ``sqft.json`` holds. Raises SqftError if it is corrupt, of another format, or not, byte for byte, what was
    written."""
    path = folder / MANIFEST
    try:
        text = read_text(path)
        values = parse_json(text, data=True)  # metrics may be NaN; a name that is given twice changes the text
        found = values.get("format", FORMAT)
        if isinstance(found, int) and found > FORMAT:
            raise SqftError(f"{path} has format {found}, this sqft reads {FORMAT}: update sqft")
        if found != FORMAT:
            raise SqftError(f"{path} has format {found}, this sqft reads {FORMAT}: run the stage again")
        if not isinstance(values.get("key"), str) or sealed_text(values) != text:
            raise ValueError("it was changed since it was written")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise SqftError(f"{path} is corrupt ({error}): run the stage again") from None
    return values


def sealed_text(values: Mapping[str, Any]) -> str:
    """A manifest's text; its ``digest`` is that of the text without it."""
    whole = json.dumps({**values, "digest": ""}, indent=2, ensure_ascii=False)
    digest = hashlib.sha256(whole.encode()).hexdigest()
    return json.dumps({**values, "digest": digest}, indent=2, ensure_ascii=False) + "\n"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents; a file that has not changed is read once a process. Raises SqftError."""
    try:
        found = path.stat()
    except OSError as error:
        raise SqftError(f"cannot read {path}: {error.strerror}") from None
    return _digest(path.absolute(), found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=10_000)
def _digest(path: Path, *unchanged: int) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise SqftError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()
