"""Stage folders: an ordinary Hugging Face folder plus ``sqft.json`` (stage, options, parent, versions, metrics, files).

``stage`` is the one way to write one. The folder is written under a temporary name beside its final one, which this
process holds meanwhile (``outputs``), and takes its place when it is whole, so that an interruption, an error or a full
disk leaves what was there before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.metadata
import itertools
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sqft.errors import SqftError, UsageError, did_you_mean, shown
from sqft.keys import FORMAT, MANIFEST, contents_key, file_digest, folder_key, read_values, sealed_text, stage_key
from sqft.options import recorded
from sqft.outputs import WRITING, beside, check_place, locked, put, sweep, synchronize, work_folder
from sqft.processes import alone, is_main_process
from sqft.strict import plain_name, plain_path

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
# What decides the numbers: arithmetic, tokens, data and their templates, proposals.
_VERSIONED = ("sqft", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "tokenizers", "datasets",
              "jinja2", "optuna", "lm_eval")  # fmt: skip


@dataclass
class Manifest:
    """What ``sqft.json`` holds.

    ``key`` identifies the result (``keys.stage_key``). ``parent`` is what it was made from, and of an adapter ``base``
    the model that it goes on, where that is another; both relative to the folder, so that runs can be moved.
    ``files`` maps each file's relative name to its bytes and SHA-256; ``digest`` is the manifest's own.
    """

    stage: str
    config: dict[str, Any] = field(default_factory=dict)
    parent: str | None = None
    parent_key: str = ""
    base: str | None = None
    base_key: str = ""
    key: str = ""
    seed: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    format: int = FORMAT
    digest: str = ""


_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("stage", "parent_key", "base_key", "key", "created", "digest"), (str,)), "format": (int,),
    **dict.fromkeys(("config", "metrics", "files", "versions"), (dict,)), "seed": (int, type(None)),
    **dict.fromkeys(("parent", "base"), (str, type(None))),
}  # fmt: skip


class Writing:
    """A stage folder that is being made: ``key``, ``metrics`` to fill, and ``folder`` to write files to."""

    def __init__(self, manifest: Manifest, out: Path | None) -> None:
        self.manifest, self.out = manifest, out
        self.metrics = manifest.metrics
        self._temporary: Path | None = None

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def folder(self) -> Path:
        """A temporary folder beside the final one, made when it is first asked for; only the main process writes."""
        assert self.out is not None and is_main_process(), "nothing is written"
        if self._temporary is None:
            self._temporary = beside(self.out, WRITING)
            self._temporary.mkdir()
        return self._temporary

    def work(self, kind: str) -> Path:
        """The folder for what an interruption must not lose, which is removed when the stage is done."""
        assert self.out is not None, "nothing is kept"
        if (found := work_folder(self.out, kind, self.key)).is_symlink():
            raise SqftError(f"{found} is a link, to which nothing is written: remove it")
        return found

    def finish(self) -> dict[str, Any]:
        """Writes the manifest and puts the folder in its place. Returns the metrics."""
        if self.out is not None:
            write_manifest(self.folder, self.manifest)
            for path in [*self.folder.rglob("*"), self.folder]:  # what is reported done survives a power cut
                synchronize(path)
            replace_folder(self.folder, self.out)
            sweep(self.out)
        return self.metrics

    def discard(self) -> None:
        if self.out is not None and is_main_process():
            sweep(self.out, work=False)


@contextlib.contextmanager
def stage(name: str, config: Any, out: str | Path | None, source: str | Path = "", *, base: str | Path = "",
          given: Mapping[str, Any] | None = None, key: str = "",
          overwrite: bool = False) -> Iterator[Writing]:  # fmt: skip
    """Everything around a stage's work: output check, clock, temporary folder, key, parent, manifest, rename. Of
    several processes only the main one may write to the folder, and all leave with its metrics.

    Args:
        config: the stage's options (a config dataclass), or None: then the result is identified by its contents.
        out: the folder to make; None: nothing is written, and only the seconds are measured.
        source: folder, file or hub name of what it is made from; "" for a live model.
        base: of an adapter that was made from another adapter, the model that it goes on.
        given: what was passed besides: plain values or configs, part of the key and the manifest.
        key: instead of the one that follows from all this.

    Raises UsageError, before any work, for an output that cannot be written, holds something, or holds the input,
    SqftError for one that another process writes, and for an input that is not what was written.
    """
    inputs = [source, base, *_folders(config)]
    with contextlib.nullcontext() if out is None else _output(out, overwrite, inputs) as path:
        yield from _stage(name, config, path, source, base, given or {}, key)


@contextlib.contextmanager
def _output(out: str | Path, overwrite: bool, inputs: list[str | Path]) -> Iterator[Path]:
    """Holds an output, rid of what a dead process left beside it. It is checked before and again when it is held."""
    path = check_output(out, overwrite, inputs)
    with locked(path):
        if is_main_process():
            sweep(path, work=False)
        yield check_output(path, overwrite, inputs)


def _stage(name: str, config: Any, path: Path | None, source: str | Path, base: str | Path, given: Mapping[str, Any],
           key: str) -> Iterator[Writing]:  # fmt: skip
    for folder in filter(None, (source, base, *_folders(config))):
        check_input(folder)
    started = time.perf_counter()
    others = {k: recorded(v) if dataclasses.is_dataclass(v) else v for k, v in given.items()}
    manifest = Manifest(name, recorded(config) | others, seed=getattr(config, "seed", None), key=key)
    if path is not None and source:
        manifest.parent, manifest.parent_key = relative_parent(source, path), folder_key(source)
    if path is not None and base:
        manifest.base, manifest.base_key = relative_parent(base, path), folder_key(base)
    if path is not None and config is not None:
        manifest.key = key or stage_key(name, config, manifest.parent_key, given)
    writing = Writing(manifest, path)
    try:
        yield writing
        if manifest.parent_key and folder_key(source) != manifest.parent_key:
            raise SqftError(f"{source} was changed while it was read: run the stage again; nothing was written")
        writing.metrics.setdefault("seconds", round(time.perf_counter() - started, 2))
        writing.metrics.update(alone(writing.finish))
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise SqftError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        writing.discard()


def _folders(config: Any) -> list[str]:
    """The folders that a config's options name."""
    specs = dataclasses.fields(config) if config is not None else ()
    return [getattr(config, spec.name) or "" for spec in specs if spec.metadata.get("kind") == "folder"]


def read_manifest(folder: str | Path) -> Manifest:
    """Reads ``sqft.json``. Raises SqftError if it is missing, corrupt, changed or of another format."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise SqftError(f"{folder} has no {MANIFEST}: it was not written by sqft")
    try:
        values = read_values(Path(folder))
        _check(values)
        return Manifest(**values)
    except ValueError as error:
        raise SqftError(f"{path} is corrupt ({error}): run the stage again") from None


def _check(values: Mapping[str, Any]) -> None:
    """Raises ValueError unless a manifest has what ``Manifest`` holds, and names files of its own folder alone."""
    if "stage" not in values:
        raise ValueError("it has no 'stage'")
    for name, value in values.items():
        if name not in _FIELDS:
            raise ValueError(f"unknown field '{shown(name)}': {did_you_mean(name, _FIELDS)}")
        if type(value) not in _FIELDS[name]:
            raise ValueError(f"{name} is {shown(repr(value))}")
    for name in ("parent", "base"):
        if not plain_path(values.get(name) or ""):
            raise ValueError(f"{name} is {shown(repr(values[name]))}, which is no path")
    for name, entry in values.get("files", {}).items():
        if not plain_name(name):
            raise ValueError(f"'{shown(name)}' is no file of this folder")
        whole = isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"}
        if not (whole and type(entry["bytes"]) is int and isinstance(entry["sha256"], str)):
            raise ValueError(f"of '{shown(name)}' it has no bytes and sha256")


def is_stage(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def check_files(folder: str | Path) -> Manifest:
    """The manifest, after checking that all its files are what was written; a README may be edited. Raises SqftError
    naming the first that is not."""
    manifest = read_manifest(folder)
    for problem in damaged(Path(folder), manifest):
        raise SqftError(f"{problem}; run its stage ('{manifest.stage}') again")
    return manifest


def check_input(folder: str | Path) -> None:
    """``check_files`` of a stage folder; nothing of any other."""
    if is_stage(folder):
        check_files(folder)


def damaged(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the files that a manifest lists."""
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            yield f"{folder} is incomplete: {name} is missing"
        elif file.suffix == ".md":
            continue
        elif (size := file.stat().st_size) != entry["bytes"]:
            yield f"{file} has {size} bytes instead of {entry['bytes']}: it is truncated or changed"
        elif file_digest(file) != entry["sha256"]:
            yield f"{file} was changed since it was written"


def accept(folder: str | Path) -> None:
    """Writes into a stage folder's manifest what its files are now, and a key of these: for what was made from it, and
    for ``run``, it is another result. Raises SqftError for a manifest that cannot be read."""
    path = Path(folder)
    manifest = read_manifest(path)
    manifest.key = ""
    write_text(path / MANIFEST, _completed(path, manifest, [path / name for name in manifest.files]))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Completes the manifest (versions, files, time, and a key of the contents if it has none) and writes it."""
    files = [file for file in sorted(folder.rglob("*")) if file.name != MANIFEST]
    (folder / MANIFEST).write_text(_completed(folder, manifest, files), encoding="utf-8")


def _completed(folder: Path, manifest: Manifest, files: Iterable[Path]) -> str:
    manifest.created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    manifest.versions = {"python": platform.python_version(),
                         "platform": f"{platform.system()} {platform.machine()}", **_versions()}  # fmt: skip
    manifest.files = {file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_digest(file)}
                      for file in files if file.is_file()}  # fmt: skip
    manifest.key = manifest.key or contents_key({name: entry["sha256"] for name, entry in manifest.files.items()})
    return sealed_text(asdict(manifest))


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_output(out: str | Path, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> Path:
    """Refuses an output that cannot be written, holds something, or holds an input, before any work is done."""
    path = Path(out)
    path = path.resolve() if path.is_symlink() else path
    check_place(path)
    if path.exists():
        if not path.is_dir():
            raise UsageError(f"{path} is a file: name a folder to write to")
        if any(path.iterdir()):
            if not overwrite:
                raise UsageError(f"{path} already holds something: name another folder or pass --overwrite")
            if not is_stage(path):
                raise UsageError(f"{path} was not written by sqft, it is not overwritten: name another folder")
        for source in inputs:
            if str(source) and Path(source).exists() and Path(source).resolve().is_relative_to(path.resolve()):
                raise UsageError(f"{path} is, or holds, the input {source}: it is not overwritten; name another folder")
    return path


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it; only the main process does. Raises SqftError if it cannot be
    written."""
    if not is_main_process():
        return
    temporary = beside(path, WRITING)
    with locked(path):
        try:
            temporary.unlink(missing_ok=True)  # of a dead process, or a link to elsewhere
            temporary.write_text(text, encoding="utf-8")
            synchronize(temporary)
            temporary.replace(path)
        except OSError as error:
            raise SqftError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from None
        finally:
            temporary.unlink(missing_ok=True)


def replace_folder(new: Path, path: Path) -> None:
    """Puts ``new`` at ``path``. Of what stood there only the files that its manifest lists are removed; with a manifest
    that cannot be read it is kept whole, as PATH.unreadable-N."""
    ours = _listed(path) if path.exists() else set()
    if ours is None:
        numbers = itertools.count(1)
        path.rename(next(kept for n in numbers if not (kept := path.with_name(f"{path.name}.unreadable-{n}")).exists()))
    elif path.exists():
        _take_along(path, new, ours)
    put(new, path)


def _listed(folder: Path) -> set[str] | None:
    """The files that sqft wrote into a folder; None if its manifest cannot be read."""
    if not is_stage(folder):
        return set()  # check_output let it pass: it is empty
    try:
        return {MANIFEST, *read_manifest(folder).files}
    except SqftError:
        return None


def _take_along(old: Path, new: Path, ours: set[str]) -> None:
    """Links what lies in a stage folder and is not sqft's. Raises SqftError if the new result has such a file."""
    for file in sorted(old.rglob("*")):
        name = file.relative_to(old).as_posix()
        if name in ours or (file.is_dir() and not file.is_symlink()):
            continue
        target = new / name
        if target.exists():
            raise SqftError(f"{file} was not written by sqft, and the new result has a file of that name: move it away")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target, follow_symlinks=False)
        except OSError:  # a file system without links
            shutil.copy2(file, target, follow_symlinks=False)


def relative_parent(parent: str | Path, out: str | Path) -> str:
    """How a manifest in ``out`` names its parent: relative, so that a folder of runs can be moved as a whole."""
    if not Path(parent).exists():
        return str(parent)
    return os.path.relpath(Path(parent).absolute(), Path(out).absolute())


def resolve_parent(folder: str | Path, parent: str) -> str:
    """Inverse of ``relative_parent``."""
    candidate = Path(folder) / parent
    return os.path.normpath(candidate) if os.path.exists(candidate) else parent
