"""``sqft bench``: runtimes side by side, each in a process of its own; what one cannot do is a row that says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pico import pico_model, pico_tokenizer

import sqft
from sqft.benching import worker
from sqft.cli import main
from sqft.deployment import BenchConfig
from sqft.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = pico_model(dtype=torch.float32)
    sqft.save(model, pico_tokenizer(), out := tmp_path_factory.mktemp("bench") / "pico")
    return out


@pytest.mark.slow
def test_models_and_runtimes_side_by_side(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sqft.sparsify(folder, sqft.SparsifyConfig(method="magnitude"), out=tmp_path / "sparse")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three"}\n')
    sqft.train(tmp_path / "sparse", sqft.TrainConfig(data=str(text), r=2, max_steps=1), out=tmp_path / "adapter")
    command = ["bench", str(folder), str(tmp_path / "adapter"), "--runtimes", "sqft,transformers", "--tokens", "32", "--rounds", "3",
               "--batch", "1,2", "--prompt", "8", "--threads", "1", "--text", str(text), "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "pico" in printed and "decode, tokens/s" in printed
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert [(row["model"], row["runtime"]) for row in rows] == [
        ("pico", "sqft"), ("pico", "transformers"), ("adapter", "sqft"), ("adapter", "transformers")]  # fmt: skip
    for row in rows[:3]:
        assert (
            [case["batch"] for case in row["cases"]] == [1, 2] and row["peak_bytes"] > 10**8 and row["load_seconds"] > 0
        )
        assert all(case["decode_per_second"] > 0 and case["cpu_seconds_per_token"] > 0 for case in row["cases"])
        assert 0 < row["cases"][0]["share_of_bandwidth"] < 1 and "share_of_bandwidth" not in row["cases"][1]
    assert rows[2]["bytes"] > rows[0]["bytes"]  # an adapter and its base
    assert "only sqft serves with its base" in rows[3]["error"]
    assert "pico" in (tmp_path / "out" / "table.md").read_text()
    assert rows[0]["perplexity"] == rows[1]["perplexity"] > 1 and rows[2]["perplexity"] > 1
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Speed" in page and "adapter in sqft: " in page and "tokens a second over size" in page
    assert "| pico | transformers |" in (tmp_path / "report.md").read_text()


def test_a_damaged_bench_file_does_not_stop_a_report(folder: Path, tmp_path: Path) -> None:
    sqft.sparsify(folder, sqft.SparsifyConfig(method="magnitude"), out=tmp_path / "sparse")
    (tmp_path / "bench.json").write_text(
        '{"rows": [1, {"cases": [3, {"batch": "x"}], "bytes": "y", "model": null}, {}]}'
    )
    assert sqft.report([tmp_path])["stages"] == 1


def test_energy_is_read_where_it_can_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir()
    counter.write_text("1500000")
    real = worker.Path
    monkeypatch.setattr(worker, "Path", lambda path: tmp_path if path == "/sys/class/powercap" else real(path))
    monkeypatch.setitem(sys.modules, "pynvml", None)

    class Session:
        def run(self, tokens: list[list[int]], new: int) -> None:
            counter.write_text(str(int(counter.read_text()) + 10**6 * new))

    assert worker.measure(Session(), 2, 8, 4, 1, 100)["joules_per_token"] == pytest.approx(0.5)
    counter.unlink()
    assert "joules_per_token" not in worker.measure(type("Quiet", (), {"run": lambda *_: None})(), 1, 8, 4, 1, 100)


@pytest.mark.slow
def test_a_runtime_that_fails_is_a_row_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    """Here with an interpreter that is there, and knows no such package."""
    config = BenchConfig(runtimes=["transformers"], tokens=2, rounds=1)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    python.chmod(0o755)
    (row,) = sqft.bench(
        [folder], config, pythons={"transformers": str(python)}, out=tmp_path / "out", say=lambda _: None
    )
    assert "transformers does not run this model: ModuleNotFoundError" in row["error"] and "cases" not in row


def test_wrong_usage(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (([str(tmp_path / "none")], "there is no folder"), ([str(folder), "--runtimes", "opnevino"], "did you mean"),
                               ([str(folder), "--python", "vllm"], "write NAME=PATH"), ([str(folder), "--batch", "0"], "batch is 0: it has to be greater than 0")):  # fmt: skip
        assert main(["bench", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UsageError, match="is not installed here: pip install vllm"):
        sqft.bench([folder], BenchConfig(runtimes=["vllm"]), out=tmp_path / "out")


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_pico_size() -> None:
    """On a CPU: it is all there when a GPU is. What it says of speed means nothing here."""
    script = Path(__file__).parents[2] / "benchmarks" / "bench_gpu.py"
    done = subprocess.run(
        [sys.executable, str(script), "--pico"], capture_output=True, text=True, cwd=script.parents[1]
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index('{\n "results"') :])
    rows = found["results"]["steps"]["rows"]
    assert [row["kind"] for row in rows[::2]] == ["LoRA", "SparsePEFT", "SQFT", "QA-SparsePEFT"]
    assert len(found["checks"]) == 9 and found["checks"][-1]["holds"]  # merged bits
