"""The highest memory use of a stretch of work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from sqft.kernels.dispatch import release_memory

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """``bytes`` of the accelerator if there is one that counts them, else resident bytes of this process (with the
    interpreter and what was loaded before); None where the system does not tell."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures from here to the end of the block."""
    release_memory()  # what earlier work left is not this work's
    peak = Peak()
    with contextlib.suppress(RuntimeError):  # there is no accelerator, or it does not count
        torch.accelerator.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not Linux, or not allowed
        _RESET.write_text("5")  # the kernel's highest resident size starts anew
    try:
        yield peak
    finally:
        peak.bytes = _highest_resident()
        with contextlib.suppress(RuntimeError):
            peak.bytes = torch.accelerator.max_memory_allocated()


def _highest_resident() -> int | None:
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
