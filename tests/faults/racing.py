"""Two processes at once, of one recipe or one search: each is right or refused with a sentence, and nothing is left.

    python tests/faults/racing.py ROUNDS RESULT.json [SECONDS]

Rounds take turns: two runs of a recipe into one folder; two searches into one folder; two searches that share a storage,
into a folder each. The second starts up to half a run after the first, which is drawn. What is there in the end is compared
with what a run that was alone made: recipes and searches of one folder to the byte, shared trials by the
scores and by their number.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]

from killing import begin, contents  # noqa: E402

RECIPE = """
model: {root}/dense
output: {root}/run
sparsify: {{method: magnitude}}
train: {{task: arithmetic, limit: 16, eval_limit: 4, max_steps: 3, save_steps: 2, batch_size: 4, search_space: [4, 2]}}
search: {{task: arithmetic, limit: 2, metric: loss, evaluations: 3}}
merge: {{}}
evaluate: {{task: arithmetic, limit: 1}}
evaluate_on: [merge]
"""
REFUSED = "is being written by another process"
EVALUATIONS = 6
KINDS = ("recipe", "search", "shared storage")


def start(rounds: int, result: Path, seconds: float = 1e9) -> dict[str, Any]:
    """``main`` in a process without threads, which a fork would lose."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                   "HF_HUB_OFFLINE": "1"}  # fmt: skip
    subprocess.run([sys.executable, __file__, str(rounds), result, str(seconds)], env=environment, check=True)
    return json.loads(result.read_text())


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def race(works: list[Callable[[], Any]], delay: float, root: Path) -> list[str]:
    """How each ended: "done", "refused", or the last of what it said."""
    logs = [root / f"log-{i}" for i in range(len(works))]
    children = []
    for work, log in zip(works, logs, strict=True):
        if children:
            time.sleep(delay)
        children.append(begin(work, log))
    codes = [ended(child) for child in children]
    said = [log.read_text() for log in logs]
    for log in logs:
        log.unlink()
    return ["done" if code == 0 else "refused" if REFUSED in text and code == 1 else f"{code}: {text[-2000:]}"
            for code, text in zip(codes, said, strict=True)]  # fmt: skip


def tried(folder: Path) -> dict[str, float]:
    """The score of each sub-adapter that a search evaluated, none of them twice."""
    points = json.loads((folder / "search.json").read_text())["points"]
    found = {json.dumps(point["ranks"]): point["score"] for point in points}
    assert len(found) == len(points)
    return found


class Race:
    """The folders and what a run that was alone makes."""

    def __init__(self, root: Path) -> None:
        self.root, self.seconds = root, 0.0
        self.expected: dict[str, dict[str, Any]] = {}
        for name, work in (("", self.prepare), ("run", self.run), ("found", lambda: self.search("found"))):
            started = time.monotonic()
            assert ended(begin(work, root / "log")) == 0, (root / "log").read_text()
            self.seconds = max(self.seconds, time.monotonic() - started)
            self.expected[name] = contents(root / name) if name else {}
            if name == "run":
                (root / "run").rename(root / "kept")  # an adapter names its base beside it
        self.points = tried(root / "found")
        (root / "log").unlink()
        self.remove()

    def prepare(self) -> None:
        from pico import pico_folder

        pico_folder(self.root / "dense")
        (self.root / "recipe.yaml").write_text(RECIPE.format(root=self.root))

    def run(self) -> None:
        import sqft

        sqft.run(self.root / "recipe.yaml")

    def search(self, out: str, storage: str | None = None) -> None:
        import sqft

        config = sqft.SearchConfig(task="arithmetic", limit=2, metric="loss", evaluations=EVALUATIONS, storage=storage)
        sqft.search(self.root / "kept" / "train", config, out=self.root / out)

    def remove(self) -> None:
        for name in ("run", "found", "other"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for file in self.root.glob("trials.db*"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    def once(self, kind: str, delay: float) -> tuple[list[str], list[str]]:
        """How both ended, and what is wrong."""
        storage = f"sqlite:///{self.root}/trials.db"
        works: dict[str, list[Callable[[], Any]]] = {
            "recipe": [self.run, self.run],
            "search": [lambda: self.search("found"), lambda: self.search("found")],
            "shared storage": [lambda: self.search("found", storage), lambda: self.search("other", storage)],
        }
        ways = race(works[kind], delay, self.root)
        wrong = [way for way in ways if way not in ("done", "refused")]
        if kind == "search":  # one that comes when the other is done finds its result there
            wrong = [way for way in wrong if "already holds something" not in way]
        if "done" not in ways:
            wrong.append("neither made the result")
        elif kind == "shared storage" and ways == ["done", "done"]:
            fewer, more = sorted((tried(self.root / name) for name in ("found", "other")), key=len)
            same = all(self.points.get(ranks, score) == score for ranks, score in more.items())
            # The last one sees the trials of both. What they propose depends on what they know when: not on which sub-adapters.
            if len(more) != EVALUATIONS or not (fewer.items() <= more.items() and same):
                wrong.append(f"of shared trials: {len(fewer)} and {len(more)} of {EVALUATIONS}")
        elif kind != "shared storage":
            name = "run" if kind == "recipe" else "found"
            made, expected = contents(self.root / name), self.expected[name]
            wrong += [f"{file} differs" for file in sorted(expected.keys() | made.keys())
                      if expected.get(file) != made.get(file)]  # fmt: skip
        left = {path.name for path in self.root.iterdir()} - {"dense", "kept", "recipe.yaml", "run", "found", "other"}
        wrong += [f"{name} is left" for name in sorted(left) if not name.startswith("trials.db")]
        self.remove()
        return ways, wrong


def main(rounds: int, result: Path, seconds: float = 1e9) -> None:
    import torch

    import sqft.compressing.stage  # before the forks, which would each do it
    import sqft.evaluation.stage
    import sqft.merging.stage
    import sqft.searching.stage
    import sqft.training.loop  # noqa: F401

    torch.set_num_threads(1)
    began = time.monotonic()
    found: dict[str, Any] = {"rounds": 0, "wrong": [], "ways": {}}
    with tempfile.TemporaryDirectory() as work:
        here = Race(Path(work))
        found["seconds_of_a_run"] = round(here.seconds, 2)
        for number in range(rounds):
            if time.monotonic() - began > seconds:
                break
            kind, delay = KINDS[number % 3], random.Random(number).uniform(0, here.seconds / 2)
            ways, wrong = here.once(kind, delay)
            found["rounds"] += 1
            found["wrong"] += [f"round {number}, {kind}: {what}" for what in wrong]
            of_kind = found["ways"].setdefault(kind, {})
            name = " and ".join(sorted(way if way in ("done", "refused") else "occupied" for way in ways))
            of_kind[name] = of_kind.get(name, 0) + 1
            found["took_seconds"] = round(time.monotonic() - began)
            result.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *map(float, sys.argv[3:]))
