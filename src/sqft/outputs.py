"""What lies beside an output while it is made, and who may make it.

    .OUT.sqft-lock       held while a process writes OUT; the system lets go of it when the process dies
    .OUT.sqft-writing    the new result; for a moment, the one that it replaced
    .OUT.sqft-old        the one that is being replaced, where two folders cannot be exchanged in one step
    .OUT.training-<key>, .OUT.searching-<key>, .OUT.compressing-<key>   what an interrupted stage goes on from

Whoever holds the lock owns all of them, so that what a dead process left is known by its name alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sqft.errors import SqftError, UsageError
from sqft.keys import file_digest
from sqft.processes import is_main_process
from sqft.strict import read_object

LOCK, WRITING, OLD = "sqft-lock", "sqft-writing", "sqft-old"
_WORK = r"(?:training|searching|compressing)-[0-9a-f]+"
_LEFT = re.compile(rf"\.(.+)\.({LOCK}|{WRITING}|{OLD}|{_WORK})", re.DOTALL)
SEAL, UNFINISHED = "sqft-whole.json", "it was not finished"
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def beside(out: Path, kind: str) -> Path:
    """Where the lock, the new result and so on of an output lie."""
    return out.absolute().with_name(f".{out.name}.{kind}")


def work_folder(out: Path, kind: str, key: str) -> Path:
    """Where a stage of this key keeps what it would go on from, until its output is there."""
    return beside(out, f"{kind}-{key[:12]}")


@contextlib.contextmanager
def locked(out: Path, name: str | Path = "") -> Iterator[None]:
    """Holds an output, called ``name`` in messages, for this process alone, and those that work with it: of these the
    main one does. Raises SqftError if another one has it, or if nothing can be written there."""
    if not is_main_process():
        yield
        return
    file = beside(out, LOCK)
    fresh = [folder for folder in file.parents if not folder.exists()]
    handle = None
    while handle is None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = hold(file)
        except FileNotFoundError:  # its folder was just removed, by a process that had made it for nothing
            continue
        except BlockingIOError:
            raise SqftError(f"{name or out} is being written by another process: wait until that ends, or name another "
                            "folder") from None  # fmt: skip
        except OSError as error:
            raise SqftError(f"cannot write to {name or out}: {error.strerror} ({file})") from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # before it is let go: whoever opened it meanwhile sees that it is gone
        os.close(handle)
        for folder in fresh:
            with contextlib.suppress(OSError):  # it is not empty: there is a result
                folder.rmdir()


def hold(file: Path, wait: bool = False) -> int | None:
    """Locks a file, made if need be; closing the handle lets go of it. None if it was removed meanwhile: try again.
    Raises BlockingIOError if another has it, unless it is to ``wait``."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(handle), os.stat(file)):
            return handle
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def check_place(path: Path) -> None:
    """Raises UsageError for an output that can be neither made nor replaced."""
    if path.is_mount():
        raise UsageError(f"{path} is a mount point, which cannot be replaced as a whole: name a folder in it")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UsageError(f"cannot write to {path}: {parent} is not a writable folder")


def put(new: Path, path: Path) -> None:
    """Puts a folder in the place of another, which ``sweep`` removes. At no time is there neither, where the system can
    exchange two; elsewhere ``sweep`` brings the old one back if the process dies between two renames."""
    if not path.exists():
        new.rename(path)
    elif not exchange(new, path):
        path.rename(beside(path, OLD))
        new.rename(path)
    synchronize(path.absolute().parent)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    if (code := ctypes.get_errno()) in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def synchronize(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(out: Path, work: bool = True) -> None:
    """Removes what a dead process left of an output that this one holds; with ``work`` also what an interrupted stage
    would go on from."""
    if (old := beside(out, OLD)).exists() and not out.exists():
        old.rename(out)
    for path in _left(out):
        if not work and _kind(path) not in (WRITING, OLD):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _kind(path: Path) -> str:
    match = _LEFT.fullmatch(path.name)
    return match[2] if match else ""


def _left(out: Path) -> list[Path]:
    """What lies beside an output, but for its lock."""
    start, parent = f".{out.name}.", out.absolute().parent
    names = os.listdir(parent) if parent.is_dir() else []
    kinds = re.compile(f"{WRITING}|{OLD}|{_WORK}")
    return sorted(parent / n for n in names if n.startswith(start) and kinds.fullmatch(n, len(start)))


def seal(folder: Path) -> None:
    """Says, last and by a rename, that a folder that an interrupted stage may go on from is whole, and what it has."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.endswith(SEAL))
    temporary = folder / f".{SEAL}"
    temporary.write_text(json.dumps({file.relative_to(folder).as_posix(): file_digest(file) for file in files}))
    temporary.replace(folder / SEAL)


def broken(folder: Path) -> str:
    """What keeps a folder from being what was sealed: nothing, ``UNFINISHED``, or what is wrong with it."""
    try:
        digests = read_object(folder / SEAL)
        wrong = [name for name, digest in digests.items()
                 if not (folder / name).is_file() or file_digest(folder / name) != digest]  # fmt: skip
    except FileNotFoundError:
        return UNFINISHED
    except (OSError, ValueError, AttributeError):
        return f"{SEAL} cannot be read"
    return f"{wrong[0]} has changed" if wrong else ""


def clean(folder: str | Path) -> list[dict[str, str]]:
    """Removes what dead processes left below a folder, and beside it of itself: locks, unfinished results, and the
    checkpoints, trials and blocks that interrupted stages would have gone on from. What a living process holds stays.

    Returns a row for each: its path, and whether it was removed or why it was kept. Raises UsageError for no folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}")
    found = [(path, match) for path in sorted(root.rglob(".*")) if (match := _LEFT.fullmatch(path.name))]
    outputs = dict.fromkeys([root.absolute(), *(path.absolute().with_name(match[1]) for path, match in found)])
    rows: list[dict[str, str]] = []
    for out in outputs:
        left = [path for path in (beside(out, LOCK), *_left(out)) if path.exists()]
        if not left:
            continue
        try:
            with locked(out):
                sweep(out)
            rows += [{"path": str(path), "state": "removed"} for path in left]
        except SqftError as error:
            rows += [{"path": str(path), "state": f"kept ({error})"} for path in left]
    return rows
