"""Files of strangers, changed at random: how many were read, and which did not end in a result or in one line.

    python benchmarks/bench_fuzz.py [--inputs 1000000] [--seconds 1e9] [--seed 0]
    python benchmarks/bench_fuzz.py --guided [--inputs 200000]    # by coverage: needs pip install atheris
    python benchmarks/bench_fuzz.py --markdown    # the table of docs/reliability.md

Updates the part "fuzz" (or "guided") of benchmarks/results/faults.json. A run that is to end early (``--seconds``) reports the inputs that
it read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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
        f"{content['inputs']:,} inputs in {content['took_seconds']:,.0f} s on one thread: {content['refused']:,} were "
        f"refused in one line, {len(content['wrong'])} ended otherwise than that or in a result. The target is {TARGET:,} inputs: {'reached' if content['inputs'] >= TARGET else 'NO, not reached'}.",
        "", "| what was changed | inputs |", "|---|---|",
        *(f"| {name.replace('_', ' ')} | {count:,} |" for name, count in counts),
        *(["", f"Guided by coverage (atheris): {guided['inputs']:,} inputs in {guided['took_seconds']:,.0f} s, "
           f"{guided['refused']:,} refused, {len(guided['wrong'])} wrong."] if guided else []),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=TARGET)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    if given.markdown:
        print(markdown())
        return
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "fuzz.json"
        numbers = (given.inputs, file) if given.guided else (given.inputs, file, given.seconds, given.seed)
        script = FAULTS / ("guided.py" if given.guided else "fuzzing.py")
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, str(script), *map(str, numbers)], env=offline, check=True)
        found = json.loads(file.read_text())
    part = "guided" if given.guided else "fuzz"
    checks = [check(f"{part}: inputs that did not end in a result or in one line", len(found["wrong"]), 0)]
    if not given.guided:
        checks.insert(0, check("fuzz: inputs", found["inputs"], TARGET, at_most=False))
    update_results("faults", part, found, checks)
    print(markdown())
    print(*found["wrong"], sep="\n")


if __name__ == "__main__":
    main()
