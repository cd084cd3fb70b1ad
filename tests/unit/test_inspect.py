"""``sqft inspect`` reads a configuration, and what it says of fits is what the stages accept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pico import pico_folder, pico_model
from transformers import AutoConfig

import sqft
from sqft.cli import main
from sqft.inspection import inspect
from sqft.models.discover import describe

LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
         "num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16"}  # fmt: skip


def test_a_model_of_70_b_parameters_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoConfig.for_model("llama", **LARGE).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "80 blocks, 70553.71 M parameters" in printed and "141.11 GB in bfloat16" in printed
    assert "model.layers.*.mlp.down_proj" in printed and "Group sizes that fit: 32, 64, 128, a row" in printed


def test_which_gpu_holds_a_stage(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **LARGE).save_pretrained(tmp_path)
    found = {row["stage"]: row for row in inspect(str(tmp_path))["gpu"]}
    weights = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert found["evaluate, float"]["memory_bytes"] == 2 * (weights + 2 * 128256 * 8192 + 161 * 8192)
    assert found["evaluate, float"]["fits"] is None and found["train, INT4 base"]["fits"] == 80
    assert found["sparsify"]["fits"] == 16 and found["quantize"]["fits"] == 24  # a block, whatever the depth
    trained = [found[f"train, {kind} base"]["memory_bytes"] for kind in ("float", "INT4")]
    assert trained[0] - trained[1] == pytest.approx(weights * (2 - 4.5 / 8))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "jamba", "gpt2", "mllama", "gemma3n_text"])
def test_what_it_says_is_what_the_stages_do(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pico_folder(tmp_path / "m", family)
    assert main(["inspect", str(tmp_path / "m"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    architecture = describe(pico_model(family))
    assert sum(kind["count"] for kind in found["kinds"]) == len(architecture.names())
    assert sum(kind["parameters"] for kind in found["kinds"]) == found["in_blocks"]
    adapted = sum(kind["count"] for kind in found["kinds"] if kind["adapted"])
    model = pico_model(family)
    sqft.attach(model, sqft.SqftConfig(r=2, sparse_adapter=False))
    assert adapted == sum("lora_A" in name for name, _ in model.named_parameters())
    for pattern in ("2:4", "32:64"):
        config = sqft.SparsifyConfig(pattern=pattern, method="magnitude")
        if pattern in found["patterns"]:
            sqft.sparsify(pico_model(family), config)
        else:
            with pytest.raises(sqft.errors.UsageError):
                sqft.sparsify(pico_model(family), config)
    kept = {"qwen3_moe": "mlp.gate.weight", "jamba": "mamba.dt_proj.weight", "mllama": "language_model.layers.1",
            "gemma3n_text": "laurel.linear_left.weight"}.get(family)  # fmt: skip
    assert not found["kept"] if kept is None else any(name.endswith(kept) for name in found["kept"])
    assert all(stage["seconds"] > 0 and stage["memory_bytes"] > 0 for stage in found["stages"])


def test_what_is_no_model_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 2
    AutoConfig.for_model("t5").save_pretrained(tmp_path / "t5")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "t5")]) == 1
    assert capsys.readouterr().err.startswith("sqft: t5 is an encoder-decoder model: ")
    with pytest.raises(sqft.errors.UsageError):
        inspect(str(tmp_path / "none"))
