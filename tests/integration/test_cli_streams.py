"""The command line's streams and old names: readers that go away, notes of renamed options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from test_cli import FAST, SQFT, TRAIN, call

import sqft.cli


def test_a_reader_of_progress_that_goes_away_does_not_stop_the_work(dense: Path, tmp_path: Path) -> None:
    """It once ended the run with exit code 0 and no result."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    reading, writing = os.pipe()
    os.close(reading)
    command = [*SQFT, "sparsify", str(dense), str(tmp_path / "out"), *FAST, "--json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=writing, text=True, check=False)
    os.close(writing)
    assert done.returncode == 0 and json.loads(done.stdout)["sparsity"] == 0.5
    assert (tmp_path / "out" / "sqft.json").is_file()


def test_a_broken_pipe_in_the_work_is_a_failure(sparse: Path, capsys, monkeypatch, tmp_path: Path) -> None:
    def broken(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sqft.cli, "_stage", broken)
    code, _, err = call(capsys, "evaluate", sparse, "--text", "builtin")
    assert code == 1 and "Broken pipe" in err


def test_the_old_name_of_adapter_is_read_with_a_note(sparse: Path, tmp_path: Path, capsys) -> None:
    code, _, err = call(capsys, "train", sparse, tmp_path / "lora", *TRAIN, "--pipeline", "lora")
    assert code == 0 and "note: 'pipeline' is now called 'adapter'" in err
    assert json.loads((tmp_path / "lora" / "sqft.json").read_text())["config"]["adapter"] == "lora"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {sparse}\noutput: {tmp_path / 'run'}\ntrain: {{task: arithmetic, pipeline: lora}}\n")
    code, _, err = call(capsys, "run", recipe, "--dry-run")
    assert code == 0 and "recipe.yaml:3: 'pipeline' is now called 'adapter'" in err
    code, _, err = call(
        capsys, "demo", "--pipeline", "sparse-peft", "--dry-run", "--model", sparse, "--output", tmp_path
    )
    assert "note: '--pipeline' is now called '--adapter'" in err


def test_standard_error_is_given_back(capsys) -> None:
    before = sys.stderr
    call(capsys, "ls", "nowhere")
    assert sys.stderr is before
