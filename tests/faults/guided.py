"""The inputs of ``fuzzing.py``, guided by the lines of sqft that they reach (atheris, libFuzzer): what ``random`` would
draw is read from bytes that it changes.

    python tests/faults/guided.py INPUTS RESULT.json

The targets that build models or pages are left to chance: here they would take all the time.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sqft"]):
    from fuzzing import TARGETS
    from world import Tally, quietly


class Given(random.Random):
    """Draws from bytes; behind their end every draw is 0."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._at = data, 0

    def getrandbits(self, k: int) -> int:
        size = (k + 7) // 8
        part = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(part, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(53) / 2**53


def main(inputs: int, file: Path) -> None:
    with tempfile.TemporaryDirectory() as work, quietly(Path(work)) as world:
        tally, targets = Tally(world), [target for target, weight in TARGETS.items() if weight >= 20]

        def one(data: bytes) -> None:
            rng = Given(data)
            tally.add(rng.choice(targets), rng, data.hex())
            if tally.found["inputs"] >= inputs or tally.found["inputs"] % 1000 == 0:
                tally.write(file)
            if tally.found["inputs"] >= inputs:  # libFuzzer ends the process, and would say nothing of it
                os._exit(0)

        # No alarm and no limit of its own: ``attempt`` has both.
        options = [
            "-timeout=0",
            "-rss_limit_mb=0",
            "-max_len=512",
            "-len_control=0",
            "-verbosity=0",
            "-print_final_stats=0",
        ]
        atheris.Setup([sys.argv[0], *options], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]).absolute())
