"""The errors that sqft raises on purpose. A message names the thing, what is wrong with it, and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

_LONGEST = 2000  # of a message
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class SqftError(Exception):
    """Something the user can fix. The command line prints the message alone and exits with 1. It is one line, whatever
    names and values a file had."""

    def __init__(self, message: object = "") -> None:
        text = " ".join(line.strip() for line in str(message).splitlines())
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 3 :]}"
        super().__init__(_CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text))


class UsageError(SqftError):
    """A wrong option, name or value. The command line exits with 2."""


class Note(UserWarning):
    """Something that was done otherwise than asked, counted. The command line prints it on a line of its own."""


class VerificationError(SqftError):
    """A merged model failed its own check; nothing was written."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is the system's, or an accelerator's, way to say that memory ran out."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(
        text in said for text in ("out of memory", "can't allocate memory", "cannot allocate memory")
    )


def shown(value: Any) -> str:
    """A value that a file holds, as a message names it: short."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = str(value) if isinstance(value, (str, Exception)) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error message: the nearest known name if one is near, else all of them."""
    known = sorted(known)
    near = len(name) <= 200 and difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known are: {', '.join(known)}" if known else "none is known"


def first_line(error: Exception) -> str:
    """What another library's error says first, with what it announces there ("install it with:"), or its kind if it
    says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])
