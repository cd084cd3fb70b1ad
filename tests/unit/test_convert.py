"""A model that is converted from disk to disk is what transformers makes of it while it loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pico import pico_folder

import sqft
from sqft.models.convert import converted
from sqft.models.dense import load_dense
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
