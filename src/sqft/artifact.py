"""Stage folders: an ordinary Hugging Face folder plus ``sqft.json`` (stage, config, parent, versions, metrics).

A folder is written under a temporary name beside its final one and renamed when it is whole, so an interruption, an
error or a full disk leaves what was there before.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sqft.errors import SqftError, UsageError

MANIFEST = "sqft.json"
MASKS = Path("masks") / "masks.safetensors"  # a folder of its own: loaders that read *.safetensors must not find it
FORMAT = 1
_VERSIONED = ("sqft", "torch", "transformers", "peft", "accelerate", "safetensors")


@dataclass
class Manifest:
    """What ``sqft.json`` holds.

    ``key`` identifies the result by what it was made from: the hash of stage, config and the parent's key.
    ``files`` maps each file's relative name to its size in bytes, so a truncated file is noticed without reading it.
    """

    stage: str
    config: dict[str, Any] = field(default_factory=dict)
    parent: str | None = None
    parent_key: str = ""
    key: str = ""
    seed: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    format: int = FORMAT


def stage_key(stage: str, config: dict[str, Any], parent_key: str) -> str:
    """Hash of what determines a stage's result: its options, the contents of files they name, and its parent.

    Equal key, equal result; ``run`` skips such a stage.
    """
    inputs: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, str) and _is_file(value):
            inputs[name] = file_digest(Path(value)).hex()
        elif name == "data_dir" and value:  # which files it has, of which size: they may be many and large
            files = (file for depth in ("*", "*/*", "*/*/*") for file in Path(value).glob(f"{depth}.json*"))
            inputs[name] = sorted((str(file.relative_to(value)), file.stat().st_size) for file in files)
            config = {**config, name: Path(value).name}
    text = json.dumps([FORMAT, stage, config, inputs, parent_key], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_file(value: str) -> bool:
    return 0 < len(value) < 256 and "\n" not in value and Path(value).is_file()


def folder_key(folder: str | Path) -> str:
    """A stage folder's key; for any other model folder or file, the hash of its contents; for a hub name, the name."""
    path = Path(folder)
    if path.is_dir() and (path / MANIFEST).is_file():
        return read_manifest(path).key
    if not path.exists():
        return hashlib.sha256(str(folder).encode()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix in (".json", ".safetensors", ".gguf", ".model", ".txt") and file.is_file():
            digest.update(file.name.encode())
            digest.update(file_digest(file))
    return digest.hexdigest()


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise SqftError(f"cannot read {path}: {error.strerror}") from None
    return digest.digest()


def read_manifest(folder: str | Path) -> Manifest:
    """Reads ``sqft.json``. Raises SqftError if it is missing, corrupt or of a newer format."""
    path = Path(folder) / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**values)
    except FileNotFoundError:
        raise SqftError(f"{folder} has no {MANIFEST}: it was not written by sqft") from None
    except (OSError, ValueError, TypeError) as error:
        raise SqftError(f"{path} is corrupt ({error}): run the stage again") from None
    if manifest.format > FORMAT:
        raise SqftError(f"{path} has format {manifest.format}, this sqft reads up to {FORMAT}: update sqft")
    return manifest


def is_stage(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def check_files(folder: str | Path) -> Manifest:
    """The manifest, after checking that its files are there, the weights in full. Raises SqftError naming the file."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, size in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise SqftError(f"{folder} is incomplete: {name} is missing; run its stage ('{manifest.stage}') again")
        if file.suffix == ".safetensors" and file.stat().st_size != size:  # a README or config may be edited
            raise SqftError(
                f"{file} has {file.stat().st_size} bytes instead of {size}: it is truncated or changed; "
                f"run its stage ('{manifest.stage}') again"
            )
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Completes the manifest (key, versions, files, time) and writes it as the folder's last file."""
    manifest.key = manifest.key or stage_key(manifest.stage, manifest.config, manifest.parent_key)
    manifest.created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    manifest.versions = {"python": platform.python_version(), **_versions()}
    manifest.files = {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_output(out: str | Path, overwrite: bool = False) -> Path:
    """Refuses an output that cannot be written, or holds something, before any work is done. Returns its path."""
    path = Path(out)
    if path.exists():
        if not path.is_dir():
            raise UsageError(f"{path} is a file: name a folder to write to")
        if any(path.iterdir()):
            if not overwrite:
                raise UsageError(f"{path} already holds something: name another folder or pass --overwrite")
            if not is_stage(path):
                raise UsageError(f"{path} was not written by sqft, it is not overwritten: name another folder")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UsageError(f"cannot write to {path}: {parent} is not a writable folder")
    return path


@contextlib.contextmanager
def writing(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside ``out``; renames it to ``out`` if the block ends well, else removes it."""
    path = check_output(out, overwrite)
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.writing-", dir=path.absolute().parent))
    except OSError as error:
        raise SqftError(f"cannot write to {path}: {error.strerror}") from None
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        replace_folder(temporary, path)
    except OSError as error:
        raise SqftError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it. Raises SqftError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # its folder may be a file
            temporary.unlink(missing_ok=True)
        raise SqftError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from None


def replace_folder(new: Path, path: Path) -> None:
    """Renames ``new`` to ``path``; what stood there is removed only afterwards."""
    old = None
    if path.exists():
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old is not None:
            old.rename(path)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def relative_parent(parent: str | Path, out: str | Path) -> str:
    """How a manifest in ``out`` names its parent: relative, so that a folder of runs can be moved as a whole."""
    if not Path(parent).exists():
        return str(parent)
    return os.path.relpath(Path(parent).absolute(), Path(out).absolute())


def resolve_parent(folder: str | Path, parent: str) -> str:
    """Inverse of ``relative_parent``."""
    candidate = Path(folder) / parent
    return os.path.normpath(candidate) if candidate.exists() else parent
