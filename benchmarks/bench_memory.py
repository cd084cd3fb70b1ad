"""Anonymous memory (what is not a page of a mapped file) of each stage against the depth of a model, and of GPTQ against the
width of a weight; and stages that have less memory than their model takes. Writes the parts "memory", "gptq" and "limit" of
benchmarks/results/scale.json.

    python benchmarks/bench_memory.py [--blocks 8 16 32 64] [--only memory|gptq|limit]
    python benchmarks/bench_memory.py --markdown    # the table of docs/scale.md
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from common import RESULTS, check, update_results
from pico import pico_folder, pico_tokenizer

DEPTHS, FLAT = (8, 16, 32, 64), 1.05
SIZES = {
    "vocab_size": 261,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
CALIBRATION = "--calibration builtin --samples 8 --length 64"
SCORE = "--text text.jsonl --length 128 --max-tokens 1024 --batch-size 4"  # no keys and values, which blocks have one each of
# Command lines, in this order: FROM OUT are folders of one depth. Training is not among them: what it holds are adapters.
STAGES = {
    "sparsify": f"sparsify dense sparse --method wanda {CALIBRATION}",
    "sparsify, --dtype float16": f"sparsify dense sparse16 --method wanda --dtype float16 {CALIBRATION}",
    "sparsify, GGUF": f"sparsify gguf/model.gguf sparse32 --method wanda {CALIBRATION}",
    "quantize": f"quantize sparse int4 --method gptq {CALIBRATION}",
    "both in one walk": f"sparsify dense both --method wanda {CALIBRATION} --then quantize",
    "merge": "merge adapter merged",
    "merge INT4": "merge adapter4 merged4",
    "evaluate": f"evaluate merged {SCORE}",
    "evaluate INT4": f"evaluate merged4 {SCORE}",
    "evaluate INT4, --no-unpack": f"evaluate merged4 {SCORE} --no-unpack",
    "evaluate an INT4 adapter": f"evaluate adapter4 {SCORE}",
    "evaluate an INT4 adapter, --no-unpack": f"evaluate adapter4 {SCORE} --no-unpack",
    "pack": "pack int4 compact",
}
MASKS = ("sparsify", "quantize", "both", "merge")  # masks are of what they make
TRAIN = "--task arithmetic --limit 8 --max-steps 1 --batch-size 2 --eval-limit 0 --r 2"
BETWEEN = {"sparsify, GGUF": "export dense gguf --to gguf",
           "merge": f"train sparse adapter --adapter sparse-peft {TRAIN}",
           "merge INT4": f"train int4 adapter4 --adapter qa-sparse-peft {TRAIN}"}  # fmt: skip


def anonymous(process: int) -> int:
    """Bytes now; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def peak(command: list[str], folder: Path) -> int:
    """The highest anonymous memory of a process, in bytes."""
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        highest = 0
        while process.poll() is None:
            highest = max(highest, anonymous(process.pid))
            time.sleep(0.005)
        assert process.returncode == 0, process.stderr and process.stderr.read()
    return highest


def memory(depths: list[int]) -> None:
    found: dict[str, dict[int, int]] = {stage: {} for stage in STAGES}
    weights: dict[int, int] = {}
    for depth in depths:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            pico_folder(folder / "dense", num_hidden_layers=depth, **SIZES)
            pico_tokenizer([("t", "h")]).save_pretrained(folder / "dense")  # of GGUF is read only what merges
            (folder / "text.jsonl").write_text(
                json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 150}) + "\n"
            )
            weights[depth] = (folder / "dense" / "model.safetensors").stat().st_size // 4
            for stage, command in STAGES.items():
                for line in (BETWEEN.get(stage), command):
                    highest = peak([sys.executable, "-m", "sqft", *line.split()], folder) if line else 0
                found[stage][depth] = highest
                print(depth, stage, highest >> 20, "MiB", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    few, many = min(depths), max(depths)
    checks = [check(f"memory: {stage}: {many} blocks / {few} blocks, without the masks that are its result",
                    held(stage, sizes[many], weights[many]) / held(stage, sizes[few], weights[few]), FLAT)
              for stage, sizes in found.items()]  # fmt: skip
    grows = {stage: (sizes[many] - sizes[few]) / (weights[many] - weights[few]) for stage, sizes in found.items()}
    update_results("scale", "memory", {"bytes": found, "weights": weights, "bytes_a_weight": grows}, checks)


def held(stage: str, size: int, weights: int) -> float:
    """Bytes without the masks, one bit a weight, of a stage whose result they are."""
    return size - weights / 8 * stage.startswith(MASKS)


GPTQ = """
import sys, torch
from bench_memory import anonymous
from sqft.quantization.gptq import gptq
from sqft.quantization.grid import GridSpec
import os, threading, time
inputs = int(sys.argv[1])
torch.manual_seed(0)
x = torch.randn(2 * inputs, inputs)
h = x.T @ x
del x
w, mask = torch.randn(64, inputs), torch.rand(64, inputs) < 0.5
gptq(w[:, :256], h[:256, :256].contiguous(), mask[:, :256], GridSpec(4, 128))  # what is there after the first use
before, highest, ended = anonymous(os.getpid()) - h.nbytes, [0], threading.Event()
def watch():
    while not ended.wait(0.002):
        highest[0] = max(highest[0], anonymous(os.getpid()))
thread = threading.Thread(target=watch)
thread.start()
gptq(w, h, mask, GridSpec(4, 128), act_order=sys.argv[2] == "True")
ended.set()
thread.join()
print((highest[0] - before) / h.nbytes)
"""


def gptq(inputs: int = 4096) -> None:
    """Of one weight of few rows: what the Hessian and its factor take, in units of I x I x 4 bytes, the Hessian counted."""
    found = {}
    for ordered in (False, True):
        command = [sys.executable, "-c", GPTQ, str(inputs), str(ordered)]
        ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        found["with --act-order" if ordered else "as it is"] = float(ran.stdout)
    print(found)
    checks = [check(f"gptq: memory / (I^2 x 4 B), I = {inputs}, {name}", value, 4) for name, value in found.items()]
    update_results("scale", "gptq", {"inputs": inputs, "units": found}, checks)


LARGE = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 4,
         "num_hidden_layers": 24}  # fmt: skip
LIMITED = {  # each with a limit, and without
    "sparsify": "sparsify dense sparse --method wanda --calibration builtin --samples 4 --length 32",
    "sparsify, --dtype bfloat16": "sparsify dense half --method magnitude --dtype bfloat16",
    "quantize": "quantize sparse int4 --method gptq --calibration builtin --samples 4 --length 32",
}


def limit(share: float = 0.75) -> None:
    """Stages under ``ulimit -d`` of a share of the model's bytes: their files, and those of a run without a limit."""
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pico_folder(folder / "dense", **LARGE)
        size = (folder / "dense" / "model.safetensors").stat().st_size
        for stage, line in LIMITED.items():
            files = []
            for most, end in ((int(share * size), ""), (resource.RLIM_INFINITY, "-free")):
                verb, source, out, *rest = line.split()
                ran = subprocess.run([sys.executable, "-m", "sqft", verb, source, out + end, *rest], cwd=folder, capture_output=True,
                                     text=True, preexec_fn=lambda most=most: resource.setrlimit(resource.RLIMIT_DATA, (most, most)))  # fmt: skip
                assert ran.returncode == 0, ran.stderr
                files.append(json.loads((folder / f"{out}{end}" / "sqft.json").read_text())["files"])
            found[stage] = sum(files[0].get(name) != files[1].get(name) for name in files[0].keys() | files[1].keys())
            print(stage, found[stage], flush=True)
    checks = [
        check(f"limit: ulimit -d {share} of the model: files that differ, {stage}", count, 0)
        for stage, count in found.items()
    ]
    update_results("scale", "limit", {"share": share, "bytes": size, "files that differ": found}, checks)


def markdown() -> str:
    content: dict[str, Any] = json.loads((RESULTS / "scale.json").read_text())["results"]
    found, units = content["memory"], content["gptq"]
    depths = list(next(iter(found["bytes"].values())))

    def ratio(stage: str, sizes: dict[str, int]) -> float:
        many, few = (held(stage, sizes[depth], found["weights"][depth]) for depth in (depths[-1], depths[0]))
        return many / few

    return "\n".join([
        f"`benchmarks/results/scale.json`, {found['date'][:10]}, {found['machine']['processor']}: highest anonymous MiB of a process, "
        f"models of {', '.join(depths)} blocks ({int(found['weights'][depths[-1]]) / 1e6:.0f} million weights in all at {depths[-1]}).", "",
        "| stage | " + " | ".join(depths) + f" | {depths[-1]} / {depths[0]}, masks left out | bytes a weight |", "|---" * (len(depths) + 3) + "|",
        *("| " + " | ".join([stage, *(f"{sizes[d] / 2**20:.0f}" for d in depths), f"{grown:.2f}" + ("" if grown <= FLAT else " (NO)"),
                             f"{found['bytes_a_weight'][stage]:.2f}"]) + " |"
          for stage, sizes in found["bytes"].items() for grown in [ratio(stage, sizes)]), "",
        f"GPTQ of a weight of {units['inputs']} inputs: " + ", ".join(f"{value:.2f} x I^2 x 4 B {name}"
                                                                     for name, value in units["units"].items()) + ".",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=list(DEPTHS))
    parser.add_argument("--only", choices=["memory", "gptq", "limit"])
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    if given.markdown:
        print(markdown())
        return
    torch.set_num_threads(1)
    if given.only in (None, "gptq"):
        gptq()
    if given.only in (None, "limit"):
        limit()
    if given.only in (None, "memory"):
        memory(given.blocks)


if __name__ == "__main__":
    main()
