"""Several processes (torchrun, gloo) do what one does: the same losses and adapters, one writer, one message, no hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_model
from safetensors.torch import load_file
from support.together import OPTIONS, compress, train

import sqft
from sqft.config import TrainConfig
from sqft.flags import written_flags
from sqft.training.loop import adapter_config
from sqft.training.sharding import held_bytes

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# Every kind of adapter, with whatever of training could know how many processes there are.
CASES: dict[str, dict[str, Any]] = {
    "sparse-peft": {"gradient_accumulation": 2, "gradient_checkpointing": True},
    "sparse-peft, elastic": {"search_space": [4, 2], "rank_every": "micro-batch", "gradient_accumulation": 2},
    "sparse-peft, distilled": {"search_space": [4, 2], "rank_strategy": "sandwich", "distill_ranks": True, "distill": "base"},
    "qa-sparse-peft": {"learn_scales": True, "train_norms": True},
    "qa-sparse-peft, elastic": {"search_space": [4, 2], "gradient_checkpointing": True, "base": "sparse"},
    "scales": {"learning_rate": 0.001, "r": 32, "lora_alpha": 64},
    "lora": {"init": "gradient"},
    "lora, elastic": {"search_space": [4, 2], "rank_scaling": "own"},
    "sqft": {"search_space": [4, 2]},
    "sparse-full": {"learning_rate": 0.001, "group_by_length": False, "r": 32, "lora_alpha": 64},  # r, alpha: the defaults
}  # fmt: skip
SHARDED = [name for name in CASES if name not in ("sparse-peft, distilled", "lora", "sparse-full")]  # those are refused
RESUMED = {"sparse-peft, elastic": "fsdp", "qa-sparse-peft": "fsdp", "sparse-full": "ddp"}


def torchrun(count: int, *arguments: str, folder: Path, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        *arguments,
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)


def together(
    count: int, jobs: list[dict[str, Any]], folder: Path, seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return torchrun(
        count,
        str(ROOT / "tests" / "support" / "together.py"),
        str(folder / "jobs.json"),
        folder=folder,
        seconds=seconds,
    )


def job(name: str, bases: dict[str, Path], out: Path, parallel: str = "ddp") -> dict[str, Any]:
    kind = name.partition(",")[0]
    options = {"adapter": kind, **CASES[name], "parallel": parallel}
    options |= {key: str(bases[options[key]]) for key in ("base", "distill") if key in options}
    base = bases["packed" if kind in ("qa-sparse-peft", "sqft", "scales") else "sparse"]
    return {"source": str(base), "out": str(out), "config": options}


@pytest.fixture(scope="module")
def bases(dense: Path, sparse: Path, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    packed = tmp_path_factory.mktemp("packed") / "model"
    sqft.quantize(sparse, sqft.QuantizeConfig(group_size=32, keep_fractions=True), tokens, out=packed)
    return {"base": dense, "sparse": sparse, "packed": packed}


@pytest.fixture(scope="module")
def two(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, trained by two processes, and each of ``RESUMED`` until it was interrupted."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [job(name, bases, folder / name) for name in CASES]
    jobs += [job(name, bases, folder / f"{name}, fsdp", "fsdp") for name in SHARDED]
    jobs += [
        {**job(name, bases, folder / f"{name}, resumed", parallel), "stop": 2} for name, parallel in RESUMED.items()
    ]
    ran = together(2, jobs, folder)
    assert ran.returncode == 0, ran.stderr
    return folder


def log_of(out: Path, *names: str) -> list[list[float]]:
    entries = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    return [[entry.get(name, 0.0) for name in names] for entry in entries]


def assert_alike(mine: Path, other: Path) -> None:
    """The same log, records of ranks and tensors, to float tolerance."""
    names = ("step", "epoch", "learning_rate", "loss", "grad_norm", "eval_loss", "labels_loss", "logits_loss",
             "blocks_loss", "ranks_loss")  # fmt: skip
    torch.testing.assert_close(
        torch.tensor(log_of(mine, *names)), torch.tensor(log_of(other, *names)), rtol=2e-4, atol=2e-5
    )
    records = [(out / "ranks.json") for out in (mine, other)]
    assert records[0].is_file() == records[1].is_file()
    if records[0].is_file():
        one, two = (json.loads(file.read_text())["records"] for file in records)
        assert [choices for choices, _ in one] == [choices for choices, _ in two]
        torch.testing.assert_close(torch.tensor([loss for _, loss in one]), torch.tensor([loss for _, loss in two]),
                                   rtol=2e-4, atol=2e-5)  # fmt: skip
    file = "adapter_model.safetensors" if (mine / "adapter_config.json").is_file() else "model.safetensors"
    tensors, others = load_file(mine / file), load_file(other / file)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(
            tensor, others[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str, bases: dict[str, Path], two: Path, tmp_path: Path) -> None:
    train(**job(name, bases, tmp_path / "one"))
    for ran in (name, f"{name}, fsdp") if name in SHARDED else (name,):
        assert_alike(tmp_path / "one", two / ran)
        metrics = [json.loads((two / f"{ran}.{rank}.json").read_text()) for rank in (0, 1)]
        assert metrics[0] == metrics[1] == json.loads((two / ran / "sqft.json").read_text())["metrics"]


CALIBRATED: dict[str, dict[str, Any]] = {
    "wanda": {"stage": "sparsify", "config": {}},
    "wanda, repaired, 16:32": {"stage": "sparsify", "config": {"repair": "layer", "pattern": "16:32"}},
    "sparsegpt 2:4": {"stage": "sparsify", "config": {"method": "sparsegpt", "pattern": "2:4"}},
    "gptq": {"stage": "quantize", "config": {"group_size": 32, "keep_fractions": True}},
    "gptaq, repaired": {"stage": "quantize", "config": {"group_size": 32, "method": "gptaq", "repair": "layer"}},
    "both": {"stage": "quantize", "config": {"group_size": 32}, "first": {"repair": "layer"}},
}  # fmt: skip


@pytest.mark.parametrize("count", [2, 4])
def test_processes_calibrate_as_one(count: int, dense: Path, tmp_path: Path) -> None:
    """The same bytes in every file: masks, weights, integers, grids and fractions."""
    jobs = [{"source": str(dense), "out": str(tmp_path / name), **case} for name, case in CALIBRATED.items()]
    ran = together(count, [{"divide": 5, "out": str(tmp_path / "divided")}, *jobs], tmp_path)
    assert ran.returncode == 0, ran.stderr
    for rank in range(count):  # each did its share, and has what all others did
        found = json.loads((tmp_path / f"divided.{rank}.json").read_text())["found"]
        assert found == [{"job": [float(i)] * i, "process": i % count} for i in range(5)]
    torch.set_num_threads(1)  # as the processes have
    for job in jobs:
        compress(**{**job, "out": f"{job['out']}, one"})
        one, many = (sqft.artifact.read_manifest(f"{job['out']}{end}") for end in (", one", ""))
        assert one.files == many.files and one.key == many.key, job["out"]
        assert "masks/masks.safetensors" in one.files or "gpt" in job["out"]


def test_calibration_that_is_not_divided_is_refused(dense: Path, tmp_path: Path, monkeypatch) -> None:
    """Experts, which other tokens reach in every process, repair of blocks, and fewer batches than processes."""
    monkeypatch.setattr("sqft.compressing.passes.count", lambda: 3)
    monkeypatch.setattr("sqft.calibration.walker.count", lambda: 3)
    tokens = torch.randint(0, 250, (4, 16))
    model: Any = pico_model("mixtral")
    with pytest.raises(
        sqft.UsageError, match="a model with experts is not divided among processes: run this stage in one"
    ):
        sqft.sparsify(model, sqft.SparsifyConfig(), tokens)
    model = pico_model()
    with pytest.raises(sqft.UsageError, match="repair block is not divided"):
        sqft.sparsify(model, sqft.SparsifyConfig(repair="block"), tokens)
    with pytest.raises(sqft.UsageError, match="2 calibration batches of 2 cannot be divided among 3 processes"):
        sqft.sparsify(model, sqft.SparsifyConfig(batch_size=2), tokens)


def test_the_comparison_can_fail(bases: dict[str, Path], two: Path, tmp_path: Path) -> None:
    """Half of the batch, which is what one of two processes sees."""
    one = job("sparse-peft", bases, tmp_path / "one")
    train(**{**one, "config": {**one["config"], "batch_size": 4}})
    with pytest.raises(AssertionError):
        assert_alike(tmp_path / "one", two / "sparse-peft")


@pytest.mark.parametrize("name", ["sparse-peft, elastic", "qa-sparse-peft", "qa-sparse-peft, elastic"])
def test_a_process_holds_its_share(name: str, bases: dict[str, Path], two: Path) -> None:
    """Of the integers, masks, fractions and a float base too."""
    options = TrainConfig(**{**OPTIONS, **job(name, bases, two)["config"]})
    model = sqft.load(job(name, bases, two)["source"])[0]
    whole = held_bytes(sqft.attach(model, adapter_config(options, model)))
    share = json.loads((two / f"{name}, fsdp" / "sqft.json").read_text())["metrics"]["held_bytes"]
    assert 0.49 * whole < share < 0.53 * whole


def test_a_run_of_all_stages(dense: Path, tmp_path: Path) -> None:
    """Each stage once, on one process what is not divided; results on standard output once; then all is skipped."""
    data = [json.dumps({"prompt": f"{i}?", "completion": f" {i}"}) for i in range(16)]
    (tmp_path / "data.jsonl").write_text("\n".join(data))
    recipe = {
        "model": str(dense), "output": "runs", "sparsify": {"samples": 4, "length": 24, "batch_size": 2},
        "train": {"data": "data.jsonl", "prompt": "{prompt}", "completion": "{completion}", "r": 4, "max_steps": 2,
                  "batch_size": 4}, "merge": {}, "evaluate": {"text": "builtin", "max_tokens": 64, "length": 32},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    ran = torchrun(2, "-m", "--", "sqft", "run", "recipe.yaml", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Merged model") == 1 and ran.stderr.count("merge: on one process, 1 wait") == 1
    for stage in ("sparsify", "train", "merge", "evaluate/model", "evaluate/merge"):
        assert sqft.artifact.check_files(tmp_path / "runs" / stage).metrics
    assert not [path.name for path in (tmp_path / "runs").iterdir() if path.name.startswith(".")]


def test_other_numbers_of_processes_go_on_and_one_error_ends_all(bases: dict[str, Path], two: Path,
                                                                 tmp_path: Path) -> None:  # fmt: skip
    """Two processes were interrupted, one went on and was interrupted, four end it: as one in one go. Then of four one
    fails: one message, nothing half-written."""
    jobs = [job(name, bases, two / f"{name}, resumed", parallel) for name, parallel in RESUMED.items()]
    for each in jobs:
        train(**each, stop=4)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": f"{i} and so on"}) for i in range(16)))
    arguments = ["train", str(bases["sparse"]), "out", "--data", "data.jsonl", "--prompt", "", "--completion", "{text}",
                 "--batch-size", "4"]  # fmt: skip
    ran = together(4, [*jobs, {"fail": arguments}], tmp_path)
    for name in RESUMED:
        assert_alike(two / name, two / f"{name}, resumed")
    assert not [path.name for path in two.iterdir() if path.name.startswith(".")]
    assert ran.returncode != 0
    said = [line for line in ran.stderr.splitlines() if line.startswith("sqft:")]
    assert said == ["sqft: the disk of this machine is full"]
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out.writing*"))


def test_a_batch_that_cannot_be_divided_is_a_usage_error(sparse: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sqft.training.trainer.count", lambda: 3)
    with pytest.raises(sqft.UsageError, match="cannot be divided among 3: make it a multiple"):
        train(str(sparse), str(tmp_path / "out"), {})
    assert not list(tmp_path.iterdir())


def test_accelerate_launches_several_processes_too(sparse: Path, tmp_path: Path) -> None:
    """Its launcher for GPUs, with the CPU as the device."""
    options = {
        "task": "arithmetic",
        "limit": 24,
        "max_steps": 2,
        "batch_size": 4,
        "eval_limit": 0,
        "search_space": [4, 2],
    }
    sqft.train(sparse, TrainConfig(**options), out=tmp_path / "one")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
               "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "sqft", "train",
               str(sparse), str(tmp_path / "two"), *written_flags(TrainConfig(**options, device="cpu"))]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("trainable parameters") == 1  # one of the two speaks
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)
    assert any(not torch.equal(one[key], two[key]) for key in one)  # sums in another order: there were two
