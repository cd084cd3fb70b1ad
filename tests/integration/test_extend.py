"""What can be added from outside, each in one file and one entry point: installed as a user would, and run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "support" / "extension"
SCRIPT = Path(__file__).parents[1] / "support" / "run_extension.py"


@pytest.mark.slow
def test_a_third_party_package_adds_one_of_each(tmp_path: Path) -> None:
    """Two sparsifiers, a family, an adapter kind, a format, an exporter, a runtime, a kernel and a task (docs/extend.md)."""
    site = tmp_path / "site"
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    source = tmp_path / "package"
    source.mkdir()
    for file in PACKAGE.rglob("*"):
        if file.suffix in (".py", ".toml"):
            (source / file.relative_to(PACKAGE)).parent.mkdir(exist_ok=True)
            (source / file.relative_to(PACKAGE)).write_text(file.read_text())
    subprocess.run([sys.executable, "-m", "pip", *install, str(source)], check=True)
    paths = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parents[1]), str(site)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "work")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [
        "refit",
        "fisher",
        "gpt_neox_japanese",
        "doubled",
        "bytes",
        "numpy",
        "plain",
        "masked_weight.cpu",
        "parity",
    ]
    assert done.stdout.split() == expected


def test_each_addition_is_one_file_and_one_row() -> None:
    rows = [line for line in (PACKAGE / "pyproject.toml").read_text().splitlines() if "sqft_example." in line]
    files = {file.stem for file in (PACKAGE / "sqft_example").glob("*.py")} - {"__init__"}
    assert len(rows) == len(files) == 9
    assert {row.split('"')[-2].split(":")[0].rsplit(".", 1)[1] for row in rows} == files
    assert max(len(file.read_text().splitlines()) for file in (PACKAGE / "sqft_example").glob("*.py")) < 40
