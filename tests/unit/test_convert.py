"""A model that is converted from disk to disk is what transformers makes of it while it loads; and files that are mapped
as read-only pages."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from pico import pico_folder
from safetensors.torch import save_file

import sqft
from sqft.deployment import ExportConfig
from sqft.exporters.stage import export
from sqft.models.convert import converted
from sqft.models.dense import load_dense
from sqft.models.mapping import Mapped, read_only
from sqft.models.reader import same_bits


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])  # the second one keeps some weights in float32
def test_the_same_bits_as_in_memory(tmp_path: Path, family: str) -> None:
    source = pico_folder(tmp_path / "source", family)
    out = converted(source, "float16", tmp_path / "work" / "out")
    assert Path(out) == tmp_path / "work" / "out"
    ours, theirs = (load_dense(folder, "float16").state_dict() for folder in (out, source))
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in ours)
    dtypes = {tensor.dtype for tensor in theirs.values()}
    assert torch.float16 in dtypes and (family == "llama" or torch.float32 in dtypes)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_gguf_file_is_what_transformers_makes_of_it(tmp_path: Path, family: str, dtype: str) -> None:
    export(pico_folder(tmp_path / "source", family), ExportConfig(to="gguf"), out=tmp_path / "g")
    file = tmp_path / "g" / "model.gguf"
    out = converted(file, dtype, tmp_path / "work" / "out")
    assert Path(out) == tmp_path / "work" / "out"
    ours, theirs = (load_dense(source, dtype) for source in (out, file))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(same_bits(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert {**ours.config.to_dict(), "_name_or_path": ""} == theirs.config.to_dict()


def test_a_gguf_file_that_cannot_be_taken_apart_is_left_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(pico_folder(tmp_path / "source"), ExportConfig(to="gguf"), out=tmp_path / "g")
    monkeypatch.setattr("sqft.models.gguf.ONE_BY_ONE", ())
    assert converted(file := tmp_path / "g" / "model.gguf", "auto", tmp_path / "out") == file
    assert not (tmp_path / "out").exists()


def test_nothing_to_convert(tmp_path: Path) -> None:
    source = pico_folder(tmp_path / "source")
    for dtype in ("auto", "float32"):
        assert converted(source, dtype, tmp_path / "out") == source
    assert not (tmp_path / "out").exists()


def test_of_a_stage_nothing_else_is_left(tmp_path: Path) -> None:
    source = pico_folder(tmp_path / "source")
    config = sqft.SparsifyConfig(method="magnitude", dtype="bfloat16")
    sqft.sparsify(source, config, out=tmp_path / "sparse")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "sparse"]
    model, _ = sqft.load(source, dtype="bfloat16")
    sqft.sparsify(model, config)
    stored = load_dense(tmp_path / "sparse").state_dict()
    assert all(same_bits(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_mapped_is_the_file_and_counts_against_no_limit(tmp_path: Path) -> None:
    tensors = {"large": torch.randn(2**13, 2**10), "bytes": torch.arange(3, dtype=torch.uint8), "none": torch.empty(0, 4),
               "half": torch.randn(5, 3).bfloat16(), "whether": torch.tensor([True, False]), "one": torch.tensor(7)}  # fmt: skip
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "pt"})
    before = psutil.Process().memory_info()
    mapped = Mapped(tmp_path / "file.safetensors")
    found = {name: mapped.get_tensor(name) for name in mapped.keys()}  # noqa: SIM118
    if hasattr(before, "data"):
        assert psutil.Process().memory_info().data - before.data < tensors["large"].nbytes / 2
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())


def test_a_model_of_read_only_pages(tmp_path: Path) -> None:
    source = pico_folder(tmp_path / "source")
    with read_only():
        ours = load_dense(source).state_dict()
    assert all(same_bits(ours[name], tensor) for name, tensor in load_dense(source).state_dict().items())
