"""``auto_batch``: when memory runs out, half as many sequences at a time, and the same result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sqft
from sqft.errors import Note
from sqft.training.trainer import SqftTrainer

OPTIONS: dict[str, Any] = {"batch_size": 6, "max_steps": 5, "r": 4, "lora_alpha": 8, "learning_rate": 0.02, "save_steps": 2,
                           "logging_steps": 1}  # fmt: skip


def small_memory(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception, first: int = 0) -> list[int]:
    """From the ``first`` step on no more than ``most`` sequences fit. Returns the sizes of the batches that were tried."""
    original, sizes = SqftTrainer.training_step, []

    def step(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > most and self.state.global_step >= first:
            raise error
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SqftTrainer, "training_step", step)
    return sizes


def of(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, Any]]:
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    return load_file(next(folder.glob("*model.safetensors"))), [json.loads(line) for line in lines], json.loads((folder / "sqft.json").read_text())  # fmt: skip


@pytest.mark.parametrize(("error", "options"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), {"search_space": [4, 2]}),
    (MemoryError(), {"gradient_accumulation": 2}),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), {"adapter": "sparse-full", "r": 32, "lora_alpha": 64}),
], ids=["elastic", "accumulated", "sparse-full"])  # fmt: skip
def test_the_same_steps_in_smaller_pieces(error, options, sparse: Path, examples, tmp_path: Path, monkeypatch) -> None:
    straight = sqft.train(
        sparse, sqft.TrainConfig(**{**OPTIONS, **options}), examples, out=tmp_path / "straight", eval_data=examples[:5]
    )
    sizes = small_memory(monkeypatch, 1, error)
    config = sqft.TrainConfig(**{**OPTIONS, **options}, auto_batch=True)
    with pytest.warns(Note, match="out of memory: again, with 1 sequences at a time and .* which is of the same"):
        metrics = sqft.train(sparse, config, examples, out=tmp_path / "pieces", eval_data=examples[:5])
    assert metrics["micro_batch"] == 1 and sizes[:2] == [6, 3] and set(sizes[2:]) == {1}
    assert metrics["steps"] == straight["steps"] and "micro_batch" not in straight
    (ours, log, manifest), (theirs, expected, before) = of(tmp_path / "pieces"), of(tmp_path / "straight")
    assert manifest["key"] == before["key"]  # about the machine
    for one, other in zip(log, expected, strict=True):
        one.pop("epoch"), other.pop("epoch")  # Trainer counts pieces
        assert one.keys() == other.keys() and one == pytest.approx(other, rel=1e-4)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-4, rtol=1e-3)


def test_it_goes_on_from_the_last_checkpoint(sparse: Path, examples, tmp_path: Path, monkeypatch) -> None:
    straight = sqft.train(sparse, sqft.TrainConfig(**OPTIONS), examples, out=tmp_path / "straight")
    sizes = small_memory(monkeypatch, 3, MemoryError(), first=3)
    with pytest.warns(Note, match="with 3 sequences"):
        metrics = sqft.train(sparse, sqft.TrainConfig(**OPTIONS, auto_batch=True), examples, out=tmp_path / "pieces")
    assert sizes == [6, 6, 6, 6, *[3] * 6] and metrics["loss"] == pytest.approx(straight["loss"], rel=1e-4)


def test_where_it_ends(sparse: Path, examples, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        small_memory(patch, 0, MemoryError())
        with pytest.raises(MemoryError), pytest.warns(Note):
            sqft.train(sparse, sqft.TrainConfig(**OPTIONS, auto_batch=True), examples, out=tmp_path / "out")
    with monkeypatch.context() as patch:
        small_memory(patch, 3, MemoryError())
        with pytest.raises(MemoryError):
            sqft.train(sparse, sqft.TrainConfig(**OPTIONS), examples, out=tmp_path / "out")
    with monkeypatch.context() as patch:
        sizes = small_memory(patch, 0, RuntimeError("another"))
        with pytest.raises(RuntimeError, match="another"):
            sqft.train(sparse, sqft.TrainConfig(**OPTIONS, auto_batch=True), examples, out=tmp_path / "out")
        assert sizes == [6]
    model, tokenizer = sqft.load(sparse)
    with pytest.raises(sqft.UsageError, match="auto_batch trains a folder"):
        sqft.train(sqft.attach(model), sqft.TrainConfig(auto_batch=True), examples, tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
