"""What a command says besides its result: how loud it is, how it puts an error, and to whom."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from sqft.errors import Note, SqftError, is_out_of_memory
from sqft.options import RenamedOption

# What takes less memory, by command.
_BLOCKS = "--batch-size, --length or --samples"
_LESS = {
    "sparsify": _BLOCKS, "quantize": _BLOCKS, "search": "--batch-size", "evaluate": "--batch-size or --length",
    "train": "--max-length or --batch-size (--auto-batch keeps what a step is of), or add --gradient-checkpointing",
    "generate": "--max-new-tokens", "bench": "--batch or --prompt",
    **dict.fromkeys(("run", "demo", "compare"), "batch_size, length, samples and max_length in the recipe (and see "
                    "train: {auto_batch: true})"),
}  # fmt: skip


class Patient:
    """A standard stream that goes on when its reader has gone, or was never there: progress and answers that nobody
    reads must not stop the work. What its encoding lacks is escaped. ``name``: of one whose contents matter, so that
    what cannot be written (a full disk) is an error."""

    def __init__(self, stream: Any, name: str = "") -> None:
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self._name = name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with self._patience():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._patience():
            self._stream.flush()

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError):  # or Python would complain at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._name and not isinstance(error, BrokenPipeError):
                raise SqftError(f"cannot write to {self._name}: {error.strerror}") from None

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
    """How a warning is printed: an option's old name and what was left out as a note, others as Python does."""
    ours = issubclass(category, (RenamedOption, Note))
    text = f"note: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno)
    sys.stderr.write(text)


def quiet(verbose: bool, command: str) -> None:
    """Without -v: only our own progress and errors. Loggers and warnings of the libraries stay silent."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")
    if verbose:
        return
    warnings.filterwarnings("ignore")
    for ours in (RenamedOption, Note):
        warnings.filterwarnings("always", category=ours)
    if command == "ls":
        return
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def describe(error: BaseException, command: str = "") -> str:
    """One clear message for any error of a command."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: earlier results are as they were; the same command goes on (training from a checkpoint)"
    if isinstance(error, SqftError):
        return str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "inline_container.cc" in str(error):  # how torch.save says it, of a checkpoint
        return f"the disk is full ({error}): free some space; nothing was changed"
    if is_out_of_memory(error):
        return f"out of memory: lower {_LESS.get(command, 'what is done at a time')}, or take a smaller model"
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot use {os.fsdecode(error.filename)}: {error.strerror}"
    return f"{type(error).__name__}: {error} (unexpected; -v shows where)"


def answer(command: str, result: Any, as_json: bool) -> None:
    """The result, to standard output."""
    print(json.dumps(result, indent=2)) if as_json else _show(command, result)
    sys.stdout.flush()


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
