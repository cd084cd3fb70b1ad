"""What a command says besides its result: how loud it is, how it puts an error, and to whom."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from sqft.errors import SqftError
from sqft.options import RenamedOption


class Patient:
    """Standard error that goes on when its reader has gone: progress that nobody reads must not stop the work."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(BrokenPipeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does, unless they are ignored (nohup) or somebody else's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def note(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """How a warning is printed: an option's old name as a note, others as Python does."""
    renamed = issubclass(category, RenamedOption)
    text = f"note: {message}\n" if renamed else warnings.formatwarning(message, category, filename, lineno)
    sys.stderr.write(text)


def quiet(verbose: bool, command: str) -> None:
    """Without -v: only our own progress and errors. Loggers and warnings of the libraries stay silent."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")
    if verbose:
        return
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=RenamedOption)
    if command == "ls":
        return
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def describe(error: BaseException) -> str:
    """One clear message for any error."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: earlier results are as they were; the same command goes on (training from a checkpoint)"
    if isinstance(error, SqftError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({error}): free some space; nothing was changed"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory: use a smaller --batch-size, or a smaller model"
    return f"{type(error).__name__}: {error} (unexpected; -v shows where)"


def answer(command: str, result: Any, as_json: bool) -> None:
    """The result, to standard output; a reader of it that has gone (head, say) has what it wanted."""
    try:
        print(json.dumps(result, indent=2)) if as_json else _show(command, result)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(command: str, result: Any) -> None:
    """Prints one stage's metrics, a line each."""
    if command in ("run", "demo", "ls", "compare", "bench", "inspect", "clean", "verify"):
        return  # they print it
    for name, value in result.items():
        if name == "tasks":  # of several: the accuracy of each
            for task, scores in value.items():
                print(f"{'  ' + task:24} {scores['accuracy']:.6g}")
        if isinstance(value, dict):
            continue
        large = isinstance(value, int) and value > 10**15  # the size of a search space, say
        text = f"{value:.6g}" if isinstance(value, float) or large else str(value)
        if isinstance(value, list):
            text = " - ".join(f"{v:.6g}" for v in value)
        print(f"{name.replace('_', ' '):24} {text}")
