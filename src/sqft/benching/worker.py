"""One runtime and one model in a process of their own, so that memory is theirs alone. Imports nothing of sqft: it may
run in another environment.

    python worker.py RUNTIME.py JSON

JSON has the folder, threads, cases of [batch, prompt tokens, new tokens], rounds and the vocabulary's size; what is
printed last is the result. Times are of ``run(prompt, 1)`` and ``run(prompt, 1 + new)``, and their difference is the
decoding.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import resource
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """The most memory that this process, or one of its children, has had."""
    status = Path("/proc/self/status")
    own = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")] if status.is_file() else []
    mine = int(own[0].split()[1]) if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * max(mine, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def joules() -> float:
    """What processors (RAPL) and NVIDIA GPUs (NVML) have taken so far; nan where neither can be read, as on most
    virtual machines. A counter of RAPL begins again after some minutes at full power."""
    total = math.nan
    for counter in Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj"):
        try:
            total = (0.0 if math.isnan(total) else total) + int(counter.read_text()) / 1e6
        except (OSError, ValueError):
            return math.nan
    with contextlib.suppress(Exception):  # no package, no driver, no counter
        import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        total = sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3 for handle in handles) + (
            0.0 if math.isnan(total) else total)  # fmt: skip
    return total


def clocked(work: Callable[[], Any]) -> tuple[float, float, float]:
    """Seconds, processor seconds of all threads, and joules of the machine."""
    wall, cpu, energy = time.perf_counter(), time.process_time(), joules()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu, joules() - energy


def measure(session: Any, batch: int, prompt: int, new: int, rounds: int, vocabulary: int) -> dict[str, float]:
    """Medians over rounds, after one that warms up."""
    drawn = random.Random(0)

    def draw() -> list[list[int]]:  # others every time: some runtimes know a prompt again
        return [[drawn.randrange(3, vocabulary) for _ in range(prompt)] for _ in range(batch)]

    first, whole = [], []
    for _ in range(rounds + 1):
        first.append(clocked(partial(session.run, draw(), 1)))
        whole.append(clocked(partial(session.run, draw(), 1 + new)))
    one, all_of_them = (
        [statistics.median(column) for column in zip(*times[1:], strict=True)] for times in (first, whole)
    )
    seconds, cpu, energy = ((long - short) / (batch * new) for long, short in zip(all_of_them, one, strict=True))
    found = {"decode_per_second": seconds and 1 / seconds, "cpu_seconds_per_token": cpu, "joules_per_token": energy}
    return {"batch": batch, "prompt": prompt, "new": new, "prefill_per_second": batch * prompt / one[0]} | {
        name: value
        for name, value in found.items()
        if value > 0  # nan where energy cannot be read; else lost in noise
    }


def main() -> None:
    runtime, job = runpy.run_path(sys.argv[1]), json.loads(sys.argv[2])
    started = time.perf_counter()
    session = runtime["Session"](job["folder"], job["threads"])
    loaded = time.perf_counter() - started
    cases = []
    for batch, prompt, new in job["cases"]:
        try:
            cases.append(measure(session, batch, prompt, new, job["rounds"], job["vocabulary"]))
        except NotImplementedError as error:
            cases.append({"batch": batch, "prompt": prompt, "new": new, "error": str(error)})
    for case in cases if runtime.get("CHILDREN") else ():
        case.pop("cpu_seconds_per_token", None)  # the work is done in other processes
    print(json.dumps({"load_seconds": loaded, "peak_bytes": peak_bytes(), "cases": cases}), flush=True)


if __name__ == "__main__":
    main()
