"""The compact form gives back every tensor and mask, bit for bit, of floats and integers, of any pattern and width."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from pico import pico_model, pico_tokenizer
from safetensors.torch import load_file, save_file

import sqft
from sqft.artifact import accept
from sqft.cli import main
from sqft.errors import SqftError, UsageError
from sqft.formats.compact import CompactReader
from sqft.kernels.compact import pack, stride, unpack
from sqft.kernels.packed import pack_mask
from sqft.models.reader import SafetensorsReader, check_equal
from sqft.sparsity.masks import collect_masks, load_masks


def random_mask(kind: str, rows: int, columns: int) -> torch.Tensor:
    mask = torch.rand(rows, columns) < {"free": 0.5, "sparse": 0.05}.get(kind, 0.5)
    if kind == "32:64":
        mask = (torch.rand(rows, columns // 64, 64).argsort(-1) < 32).view(rows, columns)
    if kind == "holes":
        mask[:, :64], mask[rows // 2] = False, False
    return torch.ones_like(mask) if kind == "full" else torch.zeros_like(mask) if kind == "empty" else mask


@pytest.mark.parametrize("bits", [0, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [*product(("free", "sparse", "holes", "full", "empty"), ((7, 192), (1, 64), (5, 70), (3, 8))), ("32:64", (7, 192))],
)
def test_a_weight_comes_back(bits: int, kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(bits)
    mask = random_mask(kind, *shape)
    w = torch.randint(0, 2**bits, shape).to(torch.uint8) if bits else torch.randn(shape, dtype=torch.bfloat16)
    made = pack(w, pack_mask(mask), bits)
    fill = torch.full((1, 1, 1), 2**bits // 2, dtype=torch.uint8) if bits else None
    assert torch.equal(unpack(made, fill), torch.where(mask, w, 2**bits // 2 if bits else 0))
    if kind == "32:64":
        assert stride(made) == (4 * bits or 32)


FOLDERS = {
    "float, masks": lambda m: sqft.sparsify(m, sqft.SparsifyConfig(method="magnitude")),
    "float, 2:4": lambda m: sqft.sparsify(m, sqft.SparsifyConfig(method="magnitude", pattern="2:4")),
    **{f"{format}, {bits}": lambda m, format=format, bits=bits, symmetric=symmetric: (
        sqft.sparsify(m, sqft.SparsifyConfig(method="magnitude")),
        sqft.quantize(m, sqft.QuantizeConfig(method="rtn", group_size=32, bits=bits, symmetric=symmetric, format=format)))
       for format, bits, symmetric in (("gptq", 4, True), ("gptq_v2", 4, False), ("gptq_v2", 3, False),
                                       ("compressed-tensors", 4, False), ("compressed-tensors", 8, True))},
}  # fmt: skip


def folder_of(kind: str, path: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
    model = pico_model("qwen2", torch.float16, **sizes)  # it has biases
    FOLDERS[kind](model)
    model.model.layers[0].self_attn.q_proj.bias.data[0] = -0.0
    sqft.save(model, pico_tokenizer(), path)
    return path


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_comes_back(kind: str, tmp_path: Path) -> None:
    before = folder_of(kind, tmp_path / "before")
    metrics = sqft.pack(before, out=tmp_path / "packed")
    assert metrics["modules"] == 14 and metrics["bytes"] < metrics["bytes_before"]
    assert not (tmp_path / "packed" / "masks").exists() and not (tmp_path / "packed" / "quantize_config.json").exists()
    check_equal(SafetensorsReader(before), CompactReader(tmp_path / "packed"))
    sqft.unpack(tmp_path / "packed", out=tmp_path / "after")
    check_equal(SafetensorsReader(before), SafetensorsReader(tmp_path / "after"))
    for name in ("masks/masks.safetensors", "config.json"):
        assert (before / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name

    one, other = sqft.load(before)[0], sqft.load(tmp_path / "packed")[0]
    assert type(one) is type(other) and one.config.to_dict().keys() == other.config.to_dict().keys()
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
    masks = collect_masks(other)
    assert all(torch.equal(mask, masks[name]) for name, mask in collect_masks(one).items()) and masks
    tokens = torch.arange(12)[None]
    assert torch.equal(one(tokens).logits, other(tokens).logits)


def test_other_tools_sparse_and_dense_folders(tmp_path: Path) -> None:
    """Without masks the zeros are what is left out, -0.0 is a value, and what is dense or odd stays as it is."""
    model = pico_model(dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[:, ::2] = 0
        layer.mlp.up_proj.weight.data[3, 4] = -0.0
    sqft.save(model, pico_tokenizer(), tmp_path / "m")
    (tmp_path / "m" / "sqft.json").unlink()
    assert sqft.pack(tmp_path / "m", out=tmp_path / "p")["modules"] == 2
    check_equal(SafetensorsReader(tmp_path / "m"), CompactReader(tmp_path / "p"))
    sqft.unpack(tmp_path / "p", out=tmp_path / "u")
    assert load_masks(tmp_path / "u") == {}
    pico_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(SqftError, match="no weight that is sparse enough"):
        sqft.pack(tmp_path / "dense", out=tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_merging_writes_the_compact_form(tmp_path: Path) -> None:
    base = folder_of("float, masks", tmp_path / "base")
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "two and two are four"}) + "\n")
    sqft.train(base, sqft.TrainConfig(data=str(text), r=2, max_steps=2, batch_size=1), out=tmp_path / "a")
    sqft.merge(tmp_path / "a", out=tmp_path / "plain")
    sqft.merge(tmp_path / "a", sqft.MergeConfig(compact=True), out=tmp_path / "compact")
    check_equal(SafetensorsReader(tmp_path / "plain"), CompactReader(tmp_path / "compact"))
    assert [file.name for file in (tmp_path / "compact").iterdir() if file.name.startswith(".")] == []


def test_a_dense_model_is_not_merged_into_the_compact_form(tmp_path: Path) -> None:
    sqft.save(pico_model(), pico_tokenizer(), tmp_path / "base")
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "two and two are four"}) + "\n")
    config = sqft.TrainConfig(adapter="lora", data=str(text), r=2, max_steps=2, batch_size=1)
    sqft.train(tmp_path / "base", config, out=tmp_path / "a")
    with pytest.raises(SqftError, match="^the model has no weight that is sparse enough"):
        sqft.merge(tmp_path / "a", sqft.MergeConfig(compact=True), out=tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "text.jsonl"]


def test_what_is_wrong_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = folder_of("gptq, 4", tmp_path / "base")
    packed, out = tmp_path / "packed", tmp_path / "out"
    assert main(["pack", str(base), str(packed)]) == 0
    for command, message in ((["pack", str(packed), str(out)], "is compact already"),
                             (["unpack", str(base), str(out)], "is not compact"),
                             (["pack", str(tmp_path / "nothing"), str(out)], "is not a folder")):  # fmt: skip
        assert main(command) == 2
        assert message in capsys.readouterr().err
    assert main(["export", str(packed), str(out)]) == 1
    assert "unpack it first" in capsys.readouterr().err
    assert main(["sparsify", str(packed), str(out), "--method", "magnitude"]) == 1
    assert "unpack it first" in capsys.readouterr().err

    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="sqft-compact"):  # others refuse it instead of reading it wrongly
        AutoModelForCausalLM.from_pretrained(packed)
    config = json.loads((packed / "config.json").read_text())
    config["version"] = 2
    (packed / "config.json").write_text(json.dumps(config))
    accept(packed)
    with pytest.raises(SqftError, match="version 2, this sqft reads 1: update sqft"):
        sqft.load(packed)
    config["version"] = 1
    (packed / "config.json").write_text(json.dumps(config))
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.compact_shape"] += 64
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises((SqftError, UsageError), match="does not fit its shape"):
        CompactReader(packed).compact("model.layers.0.mlp.up_proj")
