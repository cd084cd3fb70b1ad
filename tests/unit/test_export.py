"""Weight folders are read lazily and exported bit for bit; a folder's Python never runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pico import pico_folder, pico_model, pico_tokenizer
from safetensors.torch import load_file

import sqft
from sqft import artifact
from sqft.cli import main
from sqft.deployment import ExportConfig
from sqft.errors import SqftError, UsageError, VerificationError
from sqft.exporters.stage import export
from sqft.exporters.transformers import Transformers
from sqft.models.reader import SafetensorsReader
from sqft.options import from_dict


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A packed bfloat16 stage folder with masks, and a NaN whose bits matter."""
    model = pico_model(dtype=torch.bfloat16)
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=32))
    model.model.norm.weight.data.view(torch.int16)[3] = 0x7FC5
    sqft.save(model, pico_tokenizer(), tmp_path / "stage")
    return tmp_path / "stage"


def test_export_is_the_folder_bit_for_bit_without_sqfts_own_files(stage: Path, tmp_path: Path) -> None:
    (stage / "modeling_evil.py").write_text("raise SystemExit\n")
    metrics = export(stage, out=tmp_path / "out")
    one, other = (load_file(folder / "model.safetensors") for folder in (stage, tmp_path / "out"))
    assert metrics["tensors"] == len(one) and one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8)), name
    left = {file.relative_to(stage).as_posix() for file in stage.rglob("*") if file.is_file()} - {
        file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*")
    }
    assert left == {"masks/masks.safetensors", "modeling_evil.py"}
    assert artifact.read_manifest(tmp_path / "out").stage == "export"
    loaded, tokenizer = sqft.load(tmp_path / "out")
    assert tokenizer("a")["input_ids"] and type(loaded).__name__ == "LlamaForCausalLM"


def test_export_of_shards_is_one_file(tmp_path: Path) -> None:
    pico_model().save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(SafetensorsReader(tmp_path / "m").layout) == 20
    export(tmp_path / "m", out=tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    state = pico_model().state_dict()
    assert all(torch.equal(t, state[name]) for name, t in load_file(tmp_path / "out" / "model.safetensors").items())


def test_what_cannot_be_exported_is_refused(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="unknown exporter 'transfomers': did you mean 'transformers'"):
        from_dict(ExportConfig, {"to": "transfomers"})
    with pytest.raises(UsageError, match="already holds something"):
        export(stage, out=stage)
    with pytest.raises(SqftError, match="is not a folder"):
        export("owner/name", out=out)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(SqftError, match="merge it first"):
        export(tmp_path / "adapter", out=out)

    def wrong(self: Transformers, reader: SafetensorsReader, out: Path) -> None:
        tensors = {name: torch.zeros_like(reader.get(name)) for name in reader.layout}
        sqft.models.tensors.save_tensors(tensors, out / "model.safetensors")

    monkeypatch.setattr(Transformers, "write", wrong)
    with pytest.raises(VerificationError, match="was not written bit for bit"):
        export(stage, out=out)
    assert not out.exists()


def test_a_readers_tensors_are_known_before_they_are_read(stage: Path) -> None:
    reader = SafetensorsReader(stage)
    assert {t.device.type for t in reader.layout.values()} == {"meta"}
    for name, tensor in reader:
        assert (reader.layout[name].shape, reader.layout[name].dtype) == (tensor.shape, tensor.dtype)
    with pytest.raises(SqftError, match="has no tensor lm_head.bias"):
        reader.get("lm_head.bias")


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_folders_python_never_runs(packed: bool, tmp_path: Path, monkeypatch, capsys) -> None:
    """Even where someone pipes 'yes' into the command."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    evil = pico_folder(tmp_path / "evil")
    if packed:
        shutil.rmtree(evil)
        model = pico_model()
        sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=32))
        sqft.save(model, pico_tokenizer(), evil)
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((evil / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.M"}}
    (evil / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((evil / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (evil / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if packed:
        artifact.accept(evil)
    with pytest.raises(SqftError, match="brings Python code of its own"):
        sqft.load(evil)
    with pytest.raises(SqftError, match="brings Python code of its own"):
        sqft.models.dense.load_tokenizer(evil)
    if not packed:
        assert main(["sparsify", str(evil), str(tmp_path / "out"), "--method", "magnitude"]) == 1
        assert "brings Python code of its own" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
