"""Files of strangers, changed at random: how many were read, and which did not end in a result or in one line.

    python benchmarks/bench_fuzz.py [--inputs 1000000] [--seconds 1e9] [--seed 0] [--processes 1]
    python benchmarks/bench_fuzz.py --guided [--inputs 200000]    # by coverage: needs pip install atheris
    python benchmarks/bench_fuzz.py --markdown    # the table of docs/reliability.md

Updates the part "fuzz" (or "guided") of benchmarks/results/faults.json. A run that is to end early (``--seconds``) reports the inputs that
it read. Each process has a seed of its own, from ``--seed`` on, and its share of the inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from common import RESULTS, check, update_results

FAULTS = Path(__file__).resolve().parents[1] / "tests" / "faults"
TARGET = 10**6


def markdown() -> str:
    """The table of docs/reliability.md, from the result file."""
    results = json.loads((RESULTS / "faults.json").read_text())["results"]
    content, guided = results["fuzz"], results.get("guided")
    counts = sorted(content["by_target"].items(), key=lambda item: -item[1])
    return "\n".join([
        f"`benchmarks/results/faults.json`, part fuzz, {content['date'][:10]}, {content['machine']['processor']}: "
        f"{content['inputs']:,} inputs in {content['took_seconds']:,.0f} s on {len(content['seeds'])} threads: {content['refused']:,} were "
        f"refused in one line, {len(content['wrong'])} ended otherwise than that or in a result. The target is {TARGET:,} inputs: {'reached' if content['inputs'] >= TARGET else 'NO, not reached'}.",
        "", "| what was changed | inputs |", "|---|---|",
        *(f"| {name.replace('_', ' ')} | {count:,} |" for name, count in counts),
        *(["", f"Guided by coverage (atheris): {guided['inputs']:,} inputs in {guided['took_seconds']:,.0f} s, "
           f"{guided['refused']:,} refused, {len(guided['wrong'])} wrong."] if guided else []),
    ])  # fmt: skip


def together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of all processes, and the seconds of the one that took longest."""
    by_target: Counter[str] = sum((Counter(part["by_target"]) for part in parts), Counter())
    return {
        "inputs": sum(part["inputs"] for part in parts), "refused": sum(part["refused"] for part in parts),
        "seeds": [part.get("seed") for part in parts], "by_target": by_target,
        "took_seconds": max(part["took_seconds"] for part in parts),
        "wrong": [f"seed {part.get('seed')}: {each}" for part in parts for each in part["wrong"]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=TARGET)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    if given.markdown:
        print(markdown())
        return
    count = 1 if given.guided else given.processes
    seeds, share = range(given.seed, given.seed + count), -(-given.inputs // count)
    script = FAULTS / ("guided.py" if given.guided else "fuzzing.py")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as work:
        files = [Path(work) / f"{seed}.json" for seed in seeds]
        shares = [(share, file) if given.guided else (share, file, given.seconds, seed)
                  for seed, file in zip(seeds, files, strict=True)]  # fmt: skip
        running = [subprocess.Popen([sys.executable, str(script), *map(str, each)], env=offline) for each in shares]
        codes = [process.wait() for process in running]
        if any(codes):
            sys.exit("a process of the fuzzers failed")
        found = together([json.loads(file.read_text()) for file in files])
    part = "guided" if given.guided else "fuzz"
    checks = [check(f"{part}: inputs that did not end in a result or in one line", len(found["wrong"]), 0)]
    if not given.guided:
        checks.insert(0, check("fuzz: inputs", found["inputs"], TARGET, at_most=False))
    update_results("faults", part, found, checks)
    print(markdown())
    print(*found["wrong"], sep="\n")


if __name__ == "__main__":
    main()
