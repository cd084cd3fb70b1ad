"""What surrounds a command: memory, disks, temporary folders, streams, encodings, and names of any kind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from test_cli import FAST, SQFT, TRAIN, call, fails, snapshot

import sqft.cli

NAMES = [
    "with spaces",
    'it\'s "quoted"',
    "line\nbreak",
    "größe-尺寸-🙂",
    "[x]*?",
    "-dash",
    ".hidden",
    "$(x);&|",
    "%s{y}\\n",
    "n" * 200,
]
NASTY = "-[x] 'é🙂\"\n$(y)*{z}%s"


def environment(**others: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), **others}


@pytest.mark.parametrize("command", ["sparsify", "train", "evaluate", "generate", "run", "ls"])
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
                                   OSError(12, "Cannot allocate memory")])  # fmt: skip
def test_out_of_memory_says_what_to_lower(command: str, error: Exception, sparse: Path, capsys, monkeypatch) -> None:
    def work(*args: object) -> None:
        raise error

    for name in ("_stage", "_run", "_generate", "_ls"):
        monkeypatch.setattr(sqft.cli, name, work)
    rest = {"sparsify": [sparse, "out"], "train": [sparse, "out"], "evaluate": [sparse], "generate": [sparse, "x"],
            "run": ["demo"], "ls": []}[command]  # fmt: skip
    said = fails(capsys, 1, command, *rest)
    lower = {"train": "--max-length", "sparsify": "--samples", "evaluate": "--length", "generate": "--max-new-tokens",
             "run": "in the recipe", "ls": "smaller model"}  # fmt: skip
    assert said.startswith("sqft: out of memory: lower ") and lower[command] in said


@pytest.mark.slow
def test_memory_that_really_runs_out(sparse: Path, tmp_path: Path) -> None:
    """Under a limit of the address space (of which malloc gives back what it maps): first a sentence, then, with auto_batch,
    a result."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "x" * 500}) + "\n" for _ in range(256)))
    command = [*SQFT, "train", str(sparse), str(tmp_path / "out"), "--data", str(data), "--max-steps", "1", "--r", "2",
               "--batch-size", "256"]  # fmt: skip

    def limited(gigabytes: float, *more: str) -> subprocess.CompletedProcess:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 1e9), int(gigabytes * 1e9)))

        return subprocess.run([*command, *more], env=environment(OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="65536"), preexec_fn=limit, capture_output=True, text=True)  # fmt: skip

    sizes = [size / 10 for size in range(20, 80, 4)]
    enough = next(size for size in sizes if (done := limited(size)).returncode == 0)
    assert done.returncode == 0
    shutil.rmtree(tmp_path / "out")
    short = limited(enough - 0.4)
    print(enough, short.stderr)
    assert (
        short.returncode == 1
        and "out of memory: lower --max-length" in short.stderr
        and "Traceback" not in short.stderr
    )
    fitted = limited(enough - 0.4, "--auto-batch", "--json")
    assert fitted.returncode == 0 and "out of memory: again, with" in fitted.stderr, fitted.stderr
    assert json.loads(fitted.stdout)["micro_batch"] < 256


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Writing beyond 20 kB fails as on a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1][1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
    signal.signal(signal.SIGXFSZ, before[0])


@pytest.mark.parametrize("stage", ["quantize", "train", "merge", "pack", "export"])
def test_a_full_disk_in_every_stage(
    stage: str, sparse: Path, trained: Path, tmp_path: Path, capsys, small_disk
) -> None:
    source = trained if stage == "merge" else sparse
    more = {"quantize": [*FAST, "--group-size", 32], "train": TRAIN, "export": ["--to", "transformers"]}.get(stage, [])
    said = fails(capsys, 1, stage, source, tmp_path / "out", *more)
    assert "nothing was changed" in said and not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if ".training-" not in path.name]


def test_without_a_temporary_folder(dense: Path, sparse: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    assert call(capsys, "sparsify", dense, tmp_path / "sparse", *FAST)[0] == 0
    assert call(capsys, "train", sparse, tmp_path / "adapter", *TRAIN)[0] == 0
    assert call(capsys, "merge", tmp_path / "adapter", tmp_path / "merged")[0] == 0
    assert call(capsys, "evaluate", tmp_path / "merged", "--task", "arithmetic", "--limit", 2)[0] == 0


@pytest.fixture(scope="module")
def listed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a result with a name that ASCII lacks."""
    folder = tmp_path_factory.mktemp("listed")
    assert sqft.cli.main([str(part) for part in ("sparsify", dense, folder / "größe", *FAST)]) == 0
    return folder


def test_standard_output_that_is_gone_closed_or_full(listed: Path) -> None:
    command = " ".join([*SQFT, "ls", str(listed)])
    for line, code, said in ((f"{command} | true", 0, ""), (f"{command} >&-", 0, ""), (f"{SQFT[0]} -m sqft.cli | true", 0, ""),
                             (f"{command} > /dev/full", 1, "sqft: cannot write to standard output: No space left on device\n"),
                             (f"{command} 2> /dev/full", 0, ""), (f"{command} 2>&-", 0, "")):  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line}"], env=environment(), capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (code, said), line


@pytest.mark.parametrize("others", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                                    {"LANG": "C", "LC_ALL": "C"}, {"TERM": "dumb", "COLUMNS": "20"}])  # fmt: skip
def test_any_locale(others: dict[str, str], listed: Path, dense: Path, tmp_path: Path) -> None:
    done = subprocess.run([*SQFT, "ls", str(listed)], env=environment(**others), capture_output=True)
    assert done.returncode == 0 and b"sparsify" in done.stdout and not done.stderr, done.stderr
    wrong = subprocess.run([*SQFT, "ls", str(listed / "größer")], env=environment(**others), capture_output=True)
    expected = b"set LC_ALL=C.UTF-8" if "PYTHONUTF8" in others else b"sqft: there is no folder"
    assert wrong.returncode == 2 and expected in wrong.stderr and wrong.stderr.count(b"\n") == 1


def test_a_name_that_is_no_text(dense: Path, tmp_path: Path) -> None:
    command = [*(part.encode() for part in SQFT), b"sparsify", os.fsencode(dense), os.fsencode(tmp_path) + b"/\xff"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "rename it" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_any_name(name: str, dense: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    folder = tmp_path / name
    folder.mkdir()
    shutil.copytree(dense, folder / name)
    (folder / f"{name}.txt").write_text("Some words of a text.\n\n" * 40)
    monkeypatch.chdir(folder)
    out = "./" + name + "-out"
    assert call(capsys, "sparsify", "./" + name, out, *FAST, f"--calibration={folder / name}.txt")[0] == 0
    assert (
        call(capsys, "sparsify", "./" + name, out, *FAST, f"--calibration={folder / name}.txt", "--overwrite")[0] == 0
    )
    assert call(capsys, "verify", out, "--deep")[0] == 0
    code, text, _ = call(
        capsys, "evaluate", out, f"--text={name}.txt", "--length", 32, f"--out={name}-scores", "--json"
    )
    assert code == 0 and json.loads(text)["perplexity"] > 1
    if name[0] != ".":  # a listing leaves hidden folders out
        assert {row["stage"] for row in json.loads(call(capsys, "ls", ".", "--json")[1])} == {"sparsify", "evaluate"}
    assert not list(Path.cwd().glob(".*sqft-*"))


def test_a_whole_recipe_by_a_nasty_name(dense: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    folder = tmp_path / NASTY
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copytree(dense, NASTY)
    data = folder / f"{NASTY}.jsonl"
    data.write_text("".join(json.dumps({"q": f"{i}+1", "a": str(i + 1)}) + "\n" for i in range(16)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({
        "model": str(folder / NASTY), "output": str(folder / f"{NASTY}-run"), "sparsify": {"samples": 4, "length": 32},
        "train": {"data": str(data), "prompt": "{q}=", "completion": "{a}", "max_steps": 2, "batch_size": 4, "search_space": [4, 2]},
        "search": {"task": "arithmetic", "limit": 2, "metric": "loss", "evaluations": 3}, "merge": {},
        "evaluate": {"task": "arithmetic", "limit": 2}}))  # fmt: skip
    code, _, err = call(capsys, "run", "recipe.yaml")
    assert code == 0, err
    assert call(capsys, "run", "recipe.yaml")[2].count("unchanged, skipped") == 7
    assert call(capsys, "report", f"./{NASTY}-run")[0] == 0
    before = snapshot(folder)
    assert call(capsys, "clean", ".")[0] == 0 and snapshot(folder) == before


def test_without_a_terminal(sparse: Path, tmp_path: Path) -> None:
    """Progress is for terminals: a log has the sentences alone."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_text("text\nsome words\nmore words\n")
    arguments = ["train", sparse, tmp_path / "out", "--data", data, "--max-steps", "1", "--batch-size", "2", "--r", "2"]
    done = subprocess.run(
        [*SQFT, *map(str, arguments)], env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr and sys.stdin is not None, done.stderr


def test_standard_input_that_is_no_text_or_never_ends(sparse: Path) -> None:
    for source, said in (("/dev/zero", "a prompt of more than 16,777,216 bytes"), (sys.executable, "is not UTF-8")):
        with open(source, "rb") as stream:
            done = subprocess.run(
                [*SQFT, "generate", str(sparse), "-"], env=environment(), stdin=stream, capture_output=True, text=True
            )
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
