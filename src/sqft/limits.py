"""Limits: of this process's memory; and of templates and patterns that a stranger may have written.

What makes texts of records runs in a copy of this process (``fork``): it has no way to write files, little memory
besides what is there already, a few seconds for each record, and ends with them. A pattern that only searches is
stopped by a clock.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil

from sqft.errors import SqftError, UsageError, first_line

T = TypeVar("T")
SECONDS, BYTES = 1.0, 2**28  # of the processor for a record, and of memory besides what is there
MAPPED_FROM = -3  # mallopt's M_MMAP_THRESHOLD
GROUP = Path("/sys/fs/cgroup")  # as a container sees its own
AT_ONCE = 32  # records, on their way back
TEXT, TEXTS = 2**20, 2**28  # the most characters of a record's texts, and of all that have less than 16,384 a record


def memory_left() -> int:
    """Bytes that this process may still take: of the machine, of its control group (version 2) and of ``ulimit -d``."""
    left = [psutil.virtual_memory().available]
    if (limit := resource.getrlimit(resource.RLIMIT_DATA)[0]) != resource.RLIM_INFINITY:
        left.append(limit - getattr(psutil.Process().memory_info(), "data", 0))
    with contextlib.suppress(OSError, ValueError, KeyError):  # another system, or no limit
        limit = int((GROUP / "memory.max").read_text())
        used = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        left.append(limit - int(used["anon"]))
    return max(0, min(left))


def keep_no_addresses() -> None:
    """Under a limit of what this process may write to (``ulimit -d``), which counts addresses that glibc keeps of freed
    pieces: large ones are given back as they are freed."""
    if resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY:
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(MAPPED_FROM, 2**20)


def each(prepare: Callable[[], Callable[[T], Any]], records: Iterable[T], where: str) -> Iterator[Any]:
    """``prepare()(record)`` for each record, as JSON holds it. Raises UsageError for what took too much of anything,
    beginning with ``where``, and what the functions raise as UsageError."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        gc.disable()  # what this process would free belongs to the other one
        os.close(reader)
        _work(prepare, records, writer)
    os.close(writer)
    status = None
    try:
        total, count = 0, 0
        with os.fdopen(reader, "rb") as stream:
            for line in stream:
                found, problem = json.loads(line)
                if problem:
                    raise UsageError(problem.replace("\0", where))
                if found is None:
                    break
                total, count = total + len(line), count + len(found)
                if total > TEXTS + 16_384 * count:
                    raise UsageError(f"{where}the texts that its templates make are too long")
                yield from found
            else:
                status = os.waitpid(child, 0)[1]
                raise UsageError(f"{where}a template {_why(status)}")
    finally:
        if status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


class Apart:
    """``each`` for a process that is going to have threads, of which a copy is not whole: a copy that is made now waits
    for records, one at a time, and ends with this process."""

    def __init__(self, prepare: Callable[[], Callable[[Any], Any]], where: str) -> None:
        (asked, ask), (hear, told) = os.pipe(), os.pipe()
        self._child = os.fork()
        if self._child == 0:
            os.close(ask)
            os.close(hear)
            _wait(prepare, where, asked, told)
        os.close(asked)
        os.close(told)
        self._ask, self._hear, self._turn = os.fdopen(ask, "w"), os.fdopen(hear), threading.Lock()

    def __call__(self, record: Any) -> Any:
        """What ``prepare()(record)`` makes. Raises UsageError as ``each`` does."""
        with self._turn:
            self._ask.write(json.dumps(record) + "\n")
            self._ask.flush()
            found, problem = json.loads(self._hear.readline())
        if problem:
            raise UsageError(problem)
        return found

    def close(self) -> None:
        self._ask.close()
        self._hear.close()
        os.waitpid(self._child, 0)


def _wait(prepare: Callable[[], Callable[[Any], Any]], where: str, asked: int, told: int) -> None:
    """What the copy of ``Apart`` does; it never returns."""
    try:
        gc.disable()
        with os.fdopen(asked) as records, os.fdopen(told, "w") as answers:
            for line in records:
                try:
                    answer = [*each(prepare, [json.loads(line)], where), ""]
                except UsageError as error:
                    answer = [None, str(error)]
                answers.write(json.dumps(answer) + "\n")
                answers.flush()
    finally:
        os._exit(0)


def _why(status: int) -> str:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return f"took more than {SECONDS:g} s"
    return "needs too much memory"


def _work(prepare: Callable[[], Callable[[T], Any]], records: Iterable[T], writer: int) -> None:
    """What the copy does; it never returns."""
    code = 1
    try:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGPROF):
            signal.signal(name, signal.SIG_DFL)
        _confine()
        with os.fdopen(writer, "w", closefd=False) as stream:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            made, problem = _one(prepare)
            done: list[Any] = []
            for record in () if problem else records:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                found, problem = _one(partial(made, record))
                if problem:
                    break
                done.append(found)
                if len(done) == AT_ONCE:
                    stream.write(json.dumps([done, ""]) + "\n")
                    done = []
            stream.write(json.dumps([done, ""]) + "\n" + json.dumps([None, problem]) + "\n")
        code = 0
    finally:
        os._exit(code)


def _confine() -> None:
    with contextlib.suppress(OSError, ValueError):  # no /proc, or a hard limit that is lower
        with open("/proc/self/statm") as stream:
            now = int(stream.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (now + BYTES if hard < 0 else min(now + BYTES, hard), hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _one(make: Callable[[], Any]) -> tuple[Any, str]:
    """What was made, or what was wrong, with a NUL for ``where``."""
    try:
        found = make()
        if _length(found) > TEXT:
            return None, f"\0a template makes more than {TEXT:,} characters"
        return found, ""
    except SqftError as error:
        return None, str(error)
    except MemoryError:
        return None, "\0a template needs too much memory"
    except RecursionError:
        return None, "\0a template calls itself, or is nested, too often"


def _length(found: Any) -> int:
    if isinstance(found, (list, tuple)):
        return sum(map(_length, found))
    return len(found) if isinstance(found, str) else 8


@contextlib.contextmanager
def patience(what: str) -> Iterator[None]:
    """Stops a search for a pattern that takes more than ``SECONDS``, in the main thread. Raises UsageError."""
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_PROF)[0]:
        yield
        return

    def stop(*_: Any) -> None:
        raise UsageError(f"{what} takes more than {SECONDS:g} s to search a text: write it without nested repeats")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression. Raises ValueError for one that is none, is too long, or repeats too often."""
    if len(pattern) > 2000:
        raise ValueError("it is too long")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(first_line(error)) from None
