"""``sqft.bench``: models in the runtimes that are here, each in a process of its own: size, loading, memory, speed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sqft.artifact import write_text
from sqft.benching import worker
from sqft.config import EvaluateConfig
from sqft.deployment import BenchConfig, ExportConfig
from sqft.errors import SqftError, UsageError
from sqft.folders import base_of, is_adapter
from sqft.formats.compact import config_of, open_weights
from sqft.measuring.size import serving_bytes
from sqft.models.dense import locate
from sqft.recipe import run_stage
from sqft.registry import RUNTIMES

Say = Callable[[str], Any]


def bench(models: Sequence[str | Path], config: BenchConfig | None = None, *, pythons: Mapping[str, str] | None = None,
          out: str | Path = "runs/bench", say: Say = print) -> list[dict[str, Any]]:  # fmt: skip
    """Each model folder (or adapter, served with its base) in each runtime; writes ``bench.json`` into ``out``.

    ``pythons``: of a runtime that is installed elsewhere, the interpreter there. What a runtime cannot do is a row with
    its ``error``. Raises UsageError for an unknown runtime, a folder that is not there, or if no runtime is here.
    """
    config, pythons = config or BenchConfig(), dict(pythons or {})
    for model in models:
        if not is_adapter(model) and (locate(model)[1] or not Path(model).is_dir()):
            raise UsageError(f"{model} is not a model folder: bench reads folders, of any stage")
    chosen = config.runtimes or [name for name in RUNTIMES if name in pythons or _is_here(RUNTIMES[name])]
    for name in [*chosen, *pythons]:
        if name not in pythons and not _is_here(RUNTIMES[name]):
            raise UsageError(f"the runtime {name} is not installed here: pip install {RUNTIMES[name].PACKAGE}, or name "
                             f"the environment that has it (--python {name}=PATH)")  # fmt: skip
    speed, rows = bandwidth(config.threads), []
    Path(out).mkdir(parents=True, exist_ok=True)
    for model in models:
        scores = _perplexity(Path(model), config, Path(out), say)
        for name in chosen:
            say(f"{model}: {name}")
            row = {"model": Path(model).name, "runtime": name, "threads": config.threads, **scores}
            try:
                row |= _measure(Path(model), name, config, pythons.get(name, sys.executable), Path(out), say)
            except SqftError as error:
                row["error"] = str(error)
            for case in row.get("cases", []):
                if case["batch"] == 1 and "decode_per_second" in case:
                    case["share_of_bandwidth"] = row["bytes"] * case["decode_per_second"] / speed
            rows.append(row)
            found = {"bandwidth": speed, "rows": rows}
            write_text(Path(out) / "bench.json", json.dumps(found, indent=1) + "\n")
    return rows


def _is_here(runtime: ModuleType) -> bool:
    return importlib.util.find_spec(runtime.PACKAGE) is not None


def _perplexity(model: Path, config: BenchConfig, out: Path, say: Say) -> dict[str, Any]:
    """By sqft's exact forward: runtimes that hold the same weights differ from it by rounding alone."""
    if config.text is None:
        return {}
    asked = EvaluateConfig(text=config.text, max_tokens=config.max_tokens, batch_size=1)
    found = run_stage("evaluate", asked, str(model), out / "perplexity" / model.resolve().name, say)
    return {key: found[key] for key in ("perplexity", "perplexity_ci95") if key in found}


def _measure(model: Path, name: str, config: BenchConfig, python: str, out: Path, say: Say) -> dict[str, Any]:
    runtime, folder = RUNTIMES[name], model
    if is_adapter(model) and name != "sqft":
        raise SqftError(f"{model} is an adapter, which only sqft serves with its base: merge it for {name}")
    if runtime.EXPORT is not None:
        folder = out / "exports" / f"{model.resolve().name}-{runtime.EXPORT}"
        run_stage("export", ExportConfig(to=runtime.EXPORT, allow_lossy=config.allow_lossy), str(model), folder, say)
    weights = model if not is_adapter(model) else Path(base_of(model))
    job = {"folder": str(folder), "threads": config.threads, "rounds": config.rounds,
           "vocabulary": config_of(open_weights(weights))["vocab_size"],
           "cases": [[batch, prompt, config.tokens] for batch in config.batch for prompt in config.prompt]}  # fmt: skip
    command = [python, str(worker.__file__), str(runtime.__file__), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    last = (done.stdout.splitlines() or [""])[-1]
    if done.returncode or not last.startswith("{"):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise SqftError(f"{name} does not run this model: {said[-1].strip()[:300] if said else 'it ended silently'}")
    parts = [folder, weights] if is_adapter(model) else [folder]
    return {"bytes": sum(_bytes(part) for part in parts), **json.loads(last)}


def _bytes(folder: Path) -> int:
    """Of the weights, in whatever files the runtime has them."""
    others = [file for kind in ("openvino_model.bin", "*.onnx", "*.onnx.data") for file in folder.glob(kind)]
    return serving_bytes(folder) + sum(file.stat().st_size for file in others)


def bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes a second at which this machine sums 1 GiB: the best of the rounds."""
    before, times = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    numbers = torch.ones(1 << 28)
    for _ in range(rounds):
        started = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return numbers.nbytes / min(times)
