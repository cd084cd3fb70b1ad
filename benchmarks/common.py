"""What all benchmarks share: the machine, timing of alternatives in turn, memory of a process, result files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    flags = next((line for line in open("/proc/cpuinfo") if line.startswith("flags")), "")
    return {
        "processor": model,
        "instructions": [f for f in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if f" {f}" in flags],
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    names = ("sqft", "torch", "transformers", "peft", "accelerate", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def check(name: str, value: float, limit: float, at_most: bool = True) -> dict[str, Any]:
    """One number that is promised: its measured value, its limit, and whether it holds."""
    return {"name": name, "value": value, "limit": limit, "holds": value <= limit if at_most else value >= limit}


def write_results(name: str, results: Any, checks: list[dict[str, Any]]) -> None:
    """benchmarks/results/NAME.json, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    content = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine(),
               "versions": versions(), "checks": checks, "results": results}  # fmt: skip
    temporary = RESULTS / f".{name}.json"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, RESULTS / f"{name}.json")


def update_results(name: str, part: str, results: Any, checks: list[dict[str, Any]]) -> None:
    """Replaces one part of benchmarks/results/NAME.json, and its checks, whose names begin with it."""
    file = RESULTS / f"{name}.json"
    before = json.loads(file.read_text()) if file.is_file() else {"results": {}, "checks": []}
    kept = [entry for entry in before["checks"] if not entry["name"].startswith(f"{part}: ")]
    here = {**results, "machine": machine(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    write_results(name, {**before["results"], part: here}, kept + checks)


def alternate(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each alternative; they take turns, so that a noisy minute hits all of them."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


class PeakMemory:
    """``with PeakMemory() as peak: ...; peak.mib``: highest resident memory over what it was at the start."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._start = self._highest = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def highest_mib(self) -> float:
        """Highest resident memory of the process."""
        return self._highest / 2**20

    @property
    def mib(self) -> float:
        return (self._highest - self._start) / 2**20
