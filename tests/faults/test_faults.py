"""The short form of ``benchmarks/bench_faults.py`` and ``bench_fuzz.py``: 30 kills, about 100 changed bytes, 6 races, 10,000
files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import killing
import racing


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    found = killing.start(30, tmp_path / "kills.json")
    if found is None:
        pytest.skip("needs a C compiler")
    assert found["kills"] >= 30 and found["by_operation"] > found["by_time"] and found["operations"] > 100
    assert not found["lost"] and not found["differ"] and not found["left"], found


@pytest.mark.slow
def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "flips.json"
    subprocess.run([sys.executable, Path(__file__).parent / "flipping.py", "100", file], check=True)
    found = json.loads(file.read_text())
    assert found["flips"] == found["noticed"] >= 100 and not found["unnoticed"], found["unnoticed"]
    assert {"safetensors header", "safetensors data", "json digit", "json mark", "json cut"} <= found["by_class"].keys()
    assert len(found["by_stage"]) == 7


@pytest.mark.slow
def test_two_processes_at_once_are_right_or_refused(tmp_path: Path) -> None:
    found = racing.start(6, tmp_path / "races.json")
    assert found["rounds"] == 6 and not found["wrong"], found["wrong"]
    assert found["ways"].keys() == {"recipe", "search", "shared storage"}


@pytest.mark.slow
def test_files_of_strangers_end_in_a_result_or_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "fuzz.json"
    subprocess.run([sys.executable, Path(__file__).parent / "fuzzing.py", "10000", file], check=True)
    found = json.loads(file.read_text())
    assert found["inputs"] == 10_000 and not found["wrong"], found["wrong"]
    assert 4_000 < found["refused"] < 9_900  # it reaches the inside of what reads them
    assert len(found["by_target"]) == 18 and min(found["by_target"].values()) > 0


def test_what_fuzzing_calls_wrong(tmp_path: Path) -> None:
    """A crash, a message of two lines, a file outside: a tool that finds nothing finds these."""
    from world import World, attempt

    from sqft.errors import SqftError

    def two_lines(world: World, rng: random.Random) -> None:
        error = SqftError("x")
        error.args = ("a\nb",)
        raise error

    def crash(world: World, rng: random.Random) -> None:
        raise IndexError("x")

    def outside(world: World, rng: random.Random) -> None:
        (world.outside / "x").write_text("x")

    world = object.__new__(World)
    world.root, world.at, world.outside = tmp_path, tmp_path / "case", tmp_path / "outside"
    world.outside.mkdir()
    (world.outside / "kept").write_text("kept")
    (tmp_path / "here").mkdir()
    assert attempt(world, lambda world, rng: None, random.Random(0)) == ""
    assert "not one line" in attempt(world, two_lines, random.Random(0))
    assert "IndexError" in attempt(world, crash, random.Random(0))
    assert "outside" in attempt(world, outside, random.Random(0))
