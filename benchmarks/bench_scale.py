"""Several processes (gloo; pico models, SmolLM2): what 2 and 4 of them train beside what one does, DDP and FSDP2, every adapter
kind; bytes that a process holds; runs of `torchrun sqft run` in a row; what they prune and quantize. Writes
benchmarks/results/scale.json.

    python benchmarks/bench_scale.py            # all parts
    python benchmarks/bench_scale.py equal      # some of: equal, runs, calibrated, smollm2-calibrated, smollm2-equal
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

import torch
from common import check, update_results
from pico import pico_folder
from safetensors.torch import load_file
from support.together import train
from test_distributed import CALIBRATED, CASES, SHARDED, log_of, together, torchrun
from test_distributed import job as usual_job

import sqft
from sqft.recipe import DEMO_MODEL, resolve_model

COUNTS, RUNS, TOLERANCE = (2, 4), 20, 1e-3


def bases_in(folder: Path) -> dict[str, Path]:
    tokens = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))
    bases = {"base": pico_folder(folder / "dense"), "sparse": folder / "sparse", "packed": folder / "packed"}
    sqft.sparsify(bases["base"], sqft.SparsifyConfig(), tokens, out=bases["sparse"])
    sqft.quantize(bases["sparse"], sqft.QuantizeConfig(group_size=32, keep_fractions=True), tokens, out=bases["packed"])
    return bases


def differences(mine: Path, other: Path) -> dict[str, float]:
    """The greatest relative difference of a logged loss, and absolute of a trained weight."""
    losses = [torch.tensor(log_of(out, "loss", "eval_loss"), dtype=torch.float64) for out in (mine, other)]
    file = "adapter_model.safetensors" if (mine / "adapter_config.json").is_file() else "model.safetensors"
    tensors, others = load_file(mine / file), load_file(other / file)
    return {
        "loss": float(((losses[0] - losses[1]).abs() / losses[0].abs().clamp(min=1e-9)).max()),
        "weights": max(float((tensors[name] - others[name]).abs().max()) for name in tensors),
    }


def smollm2_bases(folder: Path) -> dict[str, Path]:
    """How well they are made does not matter here."""
    bases = {"base": folder / "dense", "sparse": folder / "sparse", "packed": folder / "packed"}
    sqft.save(*sqft.load(resolve_model(DEMO_MODEL)), bases["base"])
    sqft.sparsify(bases["base"], sqft.SparsifyConfig(method="magnitude"), out=bases["sparse"])
    sqft.quantize(bases["sparse"], sqft.QuantizeConfig(method="rtn", keep_fractions=True), out=bases["packed"])
    return bases


def equal(part: str, make: Callable[[Path], dict[str, Path]], options: dict[str, Any]) -> None:
    """``options`` of all trainings, unless a case has its own."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bases = make(folder)

        def job(name: str, bases: dict[str, Path], out: Path, parallel: str = "ddp") -> dict[str, Any]:
            usual = usual_job(name, bases, out, parallel)
            return usual | {"config": options | usual["config"]}

        for name in CASES:
            train(**job(name, bases, folder / "1" / name))
        found: dict[str, Any] = {}
        for count in COUNTS:
            jobs = {name: job(name, bases, folder / str(count) / name) for name in CASES}
            jobs |= {
                f"{name}, fsdp": job(name, bases, folder / str(count) / f"{name}, fsdp", "fsdp") for name in SHARDED
            }
            (folder / str(count)).mkdir()
            ran = together(count, list(jobs.values()), folder, seconds=3600)
            assert ran.returncode == 0, ran.stderr
            for name, each in jobs.items():
                entry = differences(folder / "1" / name.removesuffix(", fsdp"), Path(each["out"]))
                entry |= {"held_bytes": sqft.artifact.read_manifest(each["out"]).metrics.get("held_bytes")}
                found[f"{name}, {count} processes"] = entry
        checks = [check(f"{part}: {count} processes, greatest relative difference of a loss",
                        max(entry["loss"] for name, entry in found.items() if f"{count} processes" in name), TOLERANCE)
                  for count in COUNTS]  # fmt: skip
        checks += [check(f"{part}: {count} processes, greatest difference of a trained weight",
                         max(entry["weights"] for name, entry in found.items() if f"{count} processes" in name), TOLERANCE)
                   for count in COUNTS]  # fmt: skip
        checks += [check(f"{part}: {count} processes, share of an INT4 base with masks that one holds, times {count}",
                         count * found[f"qa-sparse-peft, fsdp, {count} processes"]["held_bytes"] / whole_bytes(bases), 1.1)
                   for count in COUNTS]  # fmt: skip
        update_results("scale", part, {"cases": found}, checks)


def whole_bytes(bases: dict[str, Path]) -> int:
    """What one process holds of what ``qa-sparse-peft`` trains."""
    from sqft.config import TrainConfig
    from sqft.training.loop import adapter_config
    from sqft.training.sharding import held_bytes

    model = sqft.load(bases["packed"])[0]
    return held_bytes(
        sqft.attach(model, adapter_config(TrainConfig(r=4, **CASES["qa-sparse-peft"], adapter="qa-sparse-peft"), model))
    )


def runs() -> None:
    """``torchrun sqft run`` in a row: every stage's folder has to be whole, and nothing else beside it."""
    whole = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pico_folder(folder / "dense")
        (folder / "data.jsonl").write_text("\n".join(json.dumps({"text": f"{i} and so on"}) for i in range(16)))
        for number in range(RUNS):
            recipe = {
                "model": "dense", "output": f"runs-{number}", "sparsify": {"samples": 4, "length": 24},
                "train": {"data": "data.jsonl", "prompt": "", "completion": "{text}", "r": 4, "max_steps": 2,
                          "batch_size": 4}, "merge": {},
            }  # fmt: skip
            (folder / "recipe.yaml").write_text(json.dumps(recipe))
            ran = torchrun(2, "-m", "--", "sqft", "run", "recipe.yaml", folder=folder)
            out = folder / f"runs-{number}"
            try:
                for stage in ("sparsify", "train", "merge"):
                    sqft.artifact.check_files(out / stage)
                left = sorted(path.name for path in out.iterdir())
                whole += ran.returncode == 0 and left == ["merge", "sparsify", "table.md", "train"]
            except sqft.SqftError as error:
                print(error, ran.stderr, file=sys.stderr)
            print(f"{whole} of {number + 1} runs are whole", file=sys.stderr)
    update_results("scale", "runs", {"runs": RUNS, "whole": whole},
                   [check(f"runs: whole ones of {RUNS} of torchrun sqft run, 2 processes", whole, RUNS, at_most=False)])  # fmt: skip


def calibrate(part: str, source: Path, folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    """The cases by one process and by 2 and 4, one thread each: files that are not the same bytes, and seconds."""
    seconds: dict[str, dict[str, float]] = {name: {} for name in cases}
    different = 0
    for count in (1, *COUNTS):
        jobs = {
            name: {"source": str(source), "out": str(folder / f"{name} by {count}"), **case}
            for name, case in cases.items()
        }
        ran = together(count, list(jobs.values()), folder, seconds=3600)
        assert ran.returncode == 0, ran.stderr
        for name, each in jobs.items():
            manifest = sqft.artifact.read_manifest(each["out"])
            seconds[name][str(count)] = manifest.metrics["seconds"]
            one = sqft.artifact.read_manifest(folder / f"{name} by 1").files
            different += sum(manifest.files.get(file) != entry for file, entry in one.items())
    print(json.dumps(seconds, indent=1))
    update_results("scale", part, {"seconds": seconds},
                   [check(f"{part}: files of {len(cases)} stages that differ from one process's, 2 and 4 processes", different, 0)])  # fmt: skip


def calibrated() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        calibrate("calibrated", pico_folder(folder / "dense"), folder, CALIBRATED)


def smollm2_calibrated() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, sizes = Path(temporary), {"samples": 16, "length": 256, "batch_size": 4}
        sqft.save(*sqft.load(resolve_model(DEMO_MODEL)), folder / "dense")
        cases = {"Wanda": {"stage": "sparsify", "config": sizes},
                 "Wanda, repaired": {"stage": "sparsify", "config": {**sizes, "repair": "layer"}},
                 "GPTQ": {"stage": "quantize", "config": sizes}}  # fmt: skip
        calibrate("smollm2-calibrated", folder / "dense", folder, cases)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Few steps at a low rate, at which float order does not grow into another training.
    few = {"max_steps": 2, "learning_rate": 1e-4}
    parts: dict[str, Callable[[], None]] = {
        "equal": partial(equal, "equal", bases_in, {}), "runs": runs, "calibrated": calibrated,
        "smollm2-calibrated": smollm2_calibrated, "smollm2-equal": partial(equal, "smollm2-equal", smollm2_bases, few),
    }  # fmt: skip
    for part in sys.argv[1:] or parts:
        parts[part]()
