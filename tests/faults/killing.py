"""Kills runs of a pico recipe, runs them again to the end, and compares every file with a run that was left alone.

    python tests/faults/killing.py KILLS RESULT.json [SECONDS]

Each case begins with nothing and is killed before its n-th operation on files (``shim.c`` counts them: opening for writing,
writing, truncating, flushing, renaming, removing, making folders), n going evenly over a whole run's; or at a random time.
The run that goes on is killed as well, up to five times, at a random operation of its first. Then it is run to the end.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
MEASURED = ("seconds", "peak_bytes", "repair_seconds", "decode_tokens_per_second")  # of a manifest's metrics
HANGS = 600  # seconds
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, lie evenly however many there are
RECIPE = """
model: {root}/dense
output: {root}/run
sparsify: {{method: magnitude}}
quantize: {{method: rtn, group_size: 32}}
train: {{adapter: qa-sparse-peft, task: arithmetic, limit: 16, eval_limit: 4, max_steps: 4, save_steps: 2, batch_size: 4,
         search_space: [4, 2], lora_dropout: 0.1}}
search: {{task: arithmetic, limit: 2, metric: loss, evaluations: 4}}
merge: {{}}
evaluate: {{task: arithmetic, limit: 1}}
evaluate_on: [merge]
"""


def library(folder: Path) -> Path | None:
    """The shim, compiled; None without a compiler."""
    made = folder / "shim.so"
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", made, TESTS / "faults" / "shim.c", "-ldl"], check=True
    )
    return made


def start(kills: int, result: Path, seconds: float = 1e9) -> dict[str, Any] | None:
    """``main`` in a process that has the shim; None without a compiler."""
    with tempfile.TemporaryDirectory() as work:
        shim = library(Path(work))
        if shim is None:
            return None
        environment = {**os.environ, "LD_PRELOAD": str(shim), "FAULTS_SHIM": str(shim), "OMP_NUM_THREADS": "1",
                       "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
        subprocess.run([sys.executable, __file__, str(kills), result, str(seconds)], env=environment, check=True)
    return json.loads(result.read_text())


def begin(work: Callable[[], Any], log: Path) -> int:
    """Starts it in a child, whose errors go to the log."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def forked(work: Callable[[], Any], log: Path, kill_at: int = 0, after: float | None = None) -> tuple[bool, int]:
    """Runs it in a child: whether that was killed (before its operation ``kill_at``, or ``after`` some seconds), and how
    many operations it did if not. Raises RuntimeError for one that failed."""
    shim = ctypes.CDLL(os.environ["FAULTS_SHIM"])
    shim.faults_count.restype = ctypes.c_long
    reader, writer = os.pipe()

    def counted() -> None:
        shim.faults_arm(ctypes.c_long(kill_at))
        work()
        os.write(writer, str(shim.faults_count()).encode())

    child = begin(counted, log)
    os.close(writer)
    handle = os.pidfd_open(child)
    ended = bool(select.select([handle], [], [], HANGS if after is None else after)[0])
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.close(handle)
    status = os.waitpid(child, 0)[1]
    count = os.read(reader, 100)
    os.close(reader)
    if not ended and after is None:
        raise RuntimeError(f"a run did not end in {HANGS} seconds:\n{log.read_text()[-3000:]}")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True, 0
    if status:
        raise RuntimeError(f"a run failed with {status}:\n{log.read_text()[-3000:]}")
    return False, int(count)


def contents(root: Path) -> dict[str, Any]:
    """Every file and folder below a run: bytes; of a manifest what has to be the same."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.name == "sqft.json":
            values = json.loads(path.read_text())
            metrics = {k: v for k, v in values["metrics"].items() if k not in MEASURED}
            found[name] = {**values, "metrics": metrics, "created": "", "digest": ""}
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


def main(kills: int, result: Path, seconds: float) -> None:
    sys.path.insert(0, str(TESTS))
    import torch
    from pico import pico_folder

    import sqft
    import sqft.merging.stage
    import sqft.searching.stage
    import sqft.training.loop

    torch.set_num_threads(1)
    began = time.monotonic()
    found: dict[str, Any] = {
        "kills": 0,
        "cases": 0,
        "by_operation": 0,
        "by_time": 0,
        "differ": [],
        "lost": [],
        "left": [],
    }
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        forked(lambda: pico_folder(root / "dense"), root / "log")  # in this process it would start threads
        threads = {file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")} - {"jemalloc_bg_thd"}
        assert len(threads) == 1, f"a fork of a process with threads can hang: {threads}"
        (root / "recipe.yaml").write_text(RECIPE.format(root=root))
        once = lambda: sqft.run(root / "recipe.yaml")  # noqa: E731
        _, operations = forked(once, root / "log")
        started = time.monotonic()
        expected = contents(root / "run")
        shutil.rmtree(root / "run")
        forked(once, root / "log")
        length = time.monotonic() - started
        found |= {"operations": operations, "files": len(expected), "seconds_of_a_run": round(length, 2)}
        if expected != contents(root / "run"):
            raise RuntimeError("two runs that were left alone are not the same")
        number = 0
        while found["kills"] < kills and time.monotonic() - began < seconds:
            case(root, once, number, operations, length, expected, found)
            number += 1
            found["took_seconds"] = round(time.monotonic() - began)
            result.write_text(json.dumps(found, indent=1) + "\n")


def case(root: Path, once: Callable[[], Any], number: int, operations: int, length: float,
         expected: dict[str, Any], found: dict[str, Any]) -> None:  # fmt: skip
    shutil.rmtree(root / "run", ignore_errors=True)
    rng, name = random.Random(number), f"case {number}"
    found["cases"] += 1
    try:
        for attempt in range(rng.randint(1, 6)):
            if attempt == 0 and number % 5 < 4:
                how = {"kill_at": 1 + int(number * GOLDEN % 1 * operations)}
            elif attempt == 0:
                how = {"after": rng.uniform(0, length)}
            else:
                how = {"kill_at": rng.randint(1, operations // 8)}
            killed, _ = forked(once, root / "log", **how)
            found["kills"] += killed
            found["by_time" if "after" in how else "by_operation"] += killed
        forked(once, root / "log")
    except RuntimeError as error:
        found["lost"].append(f"{name}: {error}")
        return
    got = contents(root / "run")
    found["left"] += [f"{name}: {path}" for path in sorted(got.keys() - expected.keys())]
    found["differ"] += [f"{name}: {path}" for path in sorted(expected) if got.get(path) != expected[path]]
    found["left"] += [
        f"{name}: {p.name}" for p in root.iterdir() if p.name not in ("run", "dense", "recipe.yaml", "log")
    ]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
