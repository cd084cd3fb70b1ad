"""Kills, damages and races: what is lost, what differs, what is left behind, and what nobody notices.

    python benchmarks/bench_faults.py [--kills 1000] [--flips 2000] [--races 100] [--seconds 1e9]
    python benchmarks/bench_faults.py --races 100 --only races    # that part alone
    python benchmarks/bench_faults.py --markdown    # the table of docs/reliability.md

Writes benchmarks/results/faults.json. A run that is to end early (``--seconds``) reports the kills that it made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from common import RESULTS, check, machine, update_results, write_results

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "faults"))

import killing
import racing

FAULTS = Path(killing.__file__).parent


def markdown() -> str:
    """The table of docs/reliability.md, from the result file."""
    content = json.loads((RESULTS / "faults.json").read_text())
    kills, flips, races = (content["results"][name] for name in ("kills", "flips", "races"))
    ways = ", ".join(
        f"{kind}: {', '.join(f'{way} {n}' for way, n in found.items())}" for kind, found in races["ways"].items()
    )
    kinds = sorted({name.split(" ", 1)[1] for name in flips["by_class"]})
    return "\n".join([
        f"`benchmarks/results/faults.json`, {kills['date'][:10]}, {kills['machine']['processor']}: a pico recipe of "
        f"{kills['operations']} operations on files that ends with {kills['files']} files and folders; {flips['files']} files of "
        f"{len(flips['by_stage'])} stages, {len(flips['by_class'])} classes of bytes ({', '.join(kinds)}). Two processes at once: "
        f"{races['date'][:10]}, {races['machine']['processor']}.", "",
        "| what was done | times | what was seen |", "|---|---|---|",
        f"| SIGKILL, before an operation on a file | {kills['by_operation']} | in {kills['cases']} cases, each run again to the "
        f"end: {len(kills['lost'])} did not end, {len(kills['differ'])} files differ, {len(kills['left'])} were left behind |",
        f"| SIGKILL, at a random time | {kills['by_time']} | among these cases |",
        f"| one bit changed, or the file cut | {flips['flips']} | {flips['noticed']} noticed by the next stage, by `sqft.load` "
        "and by a recipe's skip |",
        f"| two processes at once | {races['rounds']} | {len(races['wrong'])} were wrong; how they ended: {ways} |",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--races", type=int, default=100)
    parser.add_argument("--only", choices=["races"])
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    if given.markdown:
        print(markdown())
        return
    if given.only != "races":
        kills_and_flips(given)
    with tempfile.TemporaryDirectory() as work:
        record_races(racing.start(given.races, Path(work) / "races.json", given.seconds))


def record_races(found: dict[str, Any]) -> None:
    checks = [check("races: rounds of two processes at once", found["rounds"], 100, at_most=False),
              check("races: what was wrong", len(found["wrong"]), 0)]  # fmt: skip
    update_results("faults", "races", found, checks)


def kills_and_flips(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "flips.json"
        subprocess.run([sys.executable, FAULTS / "flipping.py", str(given.flips), file], check=True)
        flips = json.loads(file.read_text())
        kills = killing.start(given.kills, Path(work) / "kills.json", given.seconds)
    if kills is None:
        sys.exit("no C compiler: the shim that counts operations cannot be built")
    checks = [
        check("kills", kills["kills"], 1000, at_most=False),
        check("killed runs that did not end when run again", len(kills["lost"]), 0),
        check("files that differ from those of a run that was left alone", len(kills["differ"]), 0),
        check("files left behind", len(kills["left"]), 0),
        check("changed or cut files", flips["flips"], 2000, at_most=False),
        check(
            "share of them that the next stage, sqft.load and a skip notice",
            flips["noticed"] / flips["flips"],
            1,
            at_most=False,
        ),
    ]
    file = RESULTS / "faults.json"
    before = json.loads(file.read_text()) if file.is_file() else {"results": {}, "checks": []}
    others = [entry for entry in before["checks"] if entry["name"].startswith(("fuzz: ", "guided: ", "races: "))]
    here = {"machine": machine(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    results = {**before["results"], "kills": {**kills, **here}, "flips": {**flips, **here}}
    write_results("faults", results, checks + others)


if __name__ == "__main__":
    main()
