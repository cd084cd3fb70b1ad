"""The short form of ``benchmarks/bench_faults.py``: 30 kills, about 100 changed bytes, 6 races."""

from __future__ import annotations

import json
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
