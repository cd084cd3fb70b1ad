"""The quantized pipelines through the real command line."""

from __future__ import annotations

import json
import pkgutil
import re
import shutil
from pathlib import Path

import pytest
from pico import pico_folder, pico_model
from safetensors.torch import load_file, save_file
from test_cli import FAST, TRAIN, call, fails

from sqft.recipe import load_recipe, with_adapter

GROUP = ["--group-size", "32"]


@pytest.fixture(scope="module")
def packed(sparse: Path, tmp_path_factory) -> Path:
    import sqft

    out = tmp_path_factory.mktemp("packed") / "model"
    sqft.quantize(sparse, sqft.QuantizeConfig(method="rtn", group_size=32, format="gptq_v2"), out=out)
    return out


def test_all_stages(dense: Path, tmp_path: Path, capsys) -> None:
    packed, adapter, merged = tmp_path / "packed", tmp_path / "adapter", tmp_path / "merged"
    code, out, _ = call(capsys, "sparsify", dense, packed, *FAST, "--sparsity", "0.5", "--json", "--then", "quantize", *GROUP,
                        "--no-act-order", "--samples", 3)  # fmt: skip
    assert code == 0 and json.loads(out)["zeros_kept"] == 1.0
    config = json.loads((packed / "sqft.json").read_text())["config"]
    assert config["act_order"] is False and config["first"]["method"] == "wanda"
    assert config["samples"] == 3 and config["length"] == config["first"]["length"] == 32  # the length holds for both
    code, out, _ = call(capsys, "train", packed, adapter, *TRAIN, "--adapter", "qa-sparse-peft", "--json")
    assert code == 0 and json.loads(out)["steps"] == 3
    code, out, _ = call(capsys, "merge", adapter, merged, "--json")
    metrics = json.loads(out)
    assert code == 0 and metrics["zeros_kept"] == 1.0 and metrics["bits"] == 4
    code, out, _ = call(capsys, "evaluate", merged, "--task", "arithmetic", "--limit", 3, "--json")
    assert code == 0 and json.loads(out)["problems"] == 3
    assert call(capsys, "train", packed, tmp_path / "lora", *TRAIN, "--adapter", "sqft")[0] == 0
    assert "not on its grid" in fails(capsys, 2, "merge", tmp_path / "lora", tmp_path / "no")
    code, out, _ = call(capsys, "quantize", dense, tmp_path / "plain", *GROUP, *FAST, "--format", "compressed-tensors")
    assert code == 0 and "bits per weight" in out


def test_sparsegpt(dense: Path, tmp_path: Path, capsys) -> None:
    code, out, _ = call(capsys, "sparsify", dense, tmp_path / "sparse", *FAST, "--method", "sparsegpt", "--pattern", "16:32",
                        "--json")  # fmt: skip
    assert code == 0 and json.loads(out)["sparsity"] == 0.5
    code, out, _ = call(capsys, "sparsify", dense, tmp_path / "both", *FAST, "--method", "sparsegpt", "--sparsity", "0.6",
                        "--json", "--then", "quantize", *GROUP)  # fmt: skip
    metrics = json.loads(out)
    assert code == 0 and metrics["zeros_kept"] == 1.0 and metrics["sparsity"] >= 0.59
    assert "did you mean 'sparsegpt'" in fails(capsys, 2, "sparsify", dense, tmp_path / "no", "--method", "sparsegtp")


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["qa-sparse-peft", "sparse-peft", "sqft", "lora"])
def test_a_recipe_runs_with_each_pipeline(pipeline: str, dense: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {dense}\noutput: {tmp_path / 'run'}\nsparsify: {{samples: 4, length: 32}}\n"
        "quantize: {group_size: 32, samples: 4, length: 32}\n"
        "train: {adapter: qa-sparse-peft, base: sparsify, task: arithmetic, limit: 8, eval_limit: 4, max_steps: 2, "
        "batch_size: 4, r: 4}\n"
        "merge:\nevaluate: {task: arithmetic, limit: 2}\n"
    )
    chosen = with_adapter(load_recipe(recipe), pipeline)
    assert (chosen["quantize"] is not None) == (pipeline in ("qa-sparse-peft", "sqft"))
    import sqft

    results = sqft.run(chosen)
    last = "merge" if pipeline.endswith("sparse-peft") else "train"
    assert f"evaluate/{last}" in results and ("merge" in results) == (last == "merge")
    said: list[str] = []
    assert sqft.run(chosen, say=said.append) == results
    assert all("unchanged, skipped" in line for line in said)
    if pipeline == "qa-sparse-peft":
        assert chosen.output == str(tmp_path / "run")


def test_wrong_usage(dense: Path, sparse: Path, packed: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert "choose 2, 3, 4 or 8" in fails(capsys, 2, "quantize", sparse, out, "--bits", 5)
    assert "choose 32, 64, 128" in fails(capsys, 2, "quantize", sparse, out, "--group-size", 48)
    message = fails(capsys, 2, "quantize", sparse, out, "--group-size", 128)
    assert (
        "does not divide the 32 inputs of model.layers.0.self_attn.q_proj" in message
        and "fit the whole model: 32, -1" in message
    )
    assert "did you mean 'gptq'" in fails(capsys, 2, "quantize", sparse, out, "--method", "gpqt")
    assert "use gptq_v2" in fails(capsys, 2, "quantize", sparse, out, "--format", "gptq")
    assert "matches no module" in fails(capsys, 2, "quantize", sparse, out, *GROUP, "--exclude", "lm_head")
    assert "every module is excluded" in fails(capsys, 2, "quantize", sparse, out, *GROUP, "--exclude", "*")
    assert "scale_bits is 20" in fails(capsys, 2, "quantize", sparse, out, "--scale-bits", 20)
    assert "--then goes with sparsify" in fails(capsys, 2, "merge", sparse, out, "--then", "quantize")
    assert "--then goes with sparsify" in fails(capsys, 2, "sparsify", sparse, out, "--then", "quantise")
    assert "did you mean '--bits'" in fails(capsys, 2, "sparsify", sparse, out, "--then", "quantize", "--bitz", 4)
    assert "is a float model" in fails(capsys, 2, "train", sparse, out, *TRAIN, "--adapter", "sqft")
    assert "is an INT model" in fails(capsys, 2, "train", packed, out, *TRAIN)
    assert "go with adapter qa-sparse-peft" in fails(capsys, 2, "train", sparse, out, *TRAIN, "--learn-scales")
    assert "unknown adapter 'qat'" in fails(capsys, 2, "demo", "--adapter", "qat")
    assert "is quantized (gptq)" in fails(capsys, 1, "quantize", packed, out, *GROUP)
    assert not out.exists()


def test_widths_that_do_not_fill_words_are_refused(tmp_path: Path, capsys) -> None:
    pico_folder(tmp_path / "opt", "opt")
    from sqft.compressing.passes import quantized_layers
    from sqft.config import QuantizeConfig
    from sqft.errors import UsageError
    from sqft.models.dense import load_dense
    from sqft.models.discover import describe

    model = load_dense(tmp_path / "opt")
    linear = model.model.decoder.layers[1].fc1
    linear.weight = type(linear.weight)(linear.weight[:63].detach())
    with pytest.raises(UsageError, match="have to fill 32-bit words"):
        quantized_layers(describe(model), QuantizeConfig(group_size=32))


@pytest.mark.parametrize("bits", [2, 4])
def test_group_sizes_that_are_advised_are_accepted(bits: int) -> None:
    """A width of 40 fills 32-bit words at 4 bits and not at 2: then no group size is advised, not even -1."""
    from sqft.compressing.passes import quantized_layers
    from sqft.config import QuantizeConfig
    from sqft.errors import UsageError
    from sqft.models.discover import describe

    architecture = describe(pico_model("llama", hidden_size=40, intermediate_size=80, num_attention_heads=5,
                                       num_key_value_heads=5, head_dim=8))  # fmt: skip
    with pytest.raises(UsageError) as error:
        quantized_layers(architecture, QuantizeConfig(bits=bits, group_size=64))
    advised = re.findall(r"-?[0-9]+", str(error.value).partition("these fit the whole model: ")[2])
    assert advised == (["-1"] if bits == 4 else [])
    for size in advised:
        quantized_layers(architecture, QuantizeConfig(bits=bits, group_size=int(size)))


def test_corrupt_packed_folders(packed: Path, tmp_path: Path, capsys) -> None:
    def damaged(change) -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(packed, folder)
        (folder / "sqft.json").unlink()
        change(folder)
        return folder

    def cut(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    def drop(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.scales"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def shrink(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        key = "model.layers.1.mlp.up_proj.qweight"
        tensors[key] = tensors[key][:-1].contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def rename(folder: Path) -> None:
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"gptq_v2"', '"marlin"'))

    for change, message in [(cut, "corrupt or truncated"), (drop, "up_proj.scales"), (shrink, "up_proj.qweight is"),
                            (rename, "marlin")]:  # fmt: skip
        assert message in fails(capsys, 1, "evaluate", damaged(change), "--text", "builtin")


def test_ctrl_c_in_quantize(sparse: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = pkgutil.resolve_name("sqft.quantization.gptq:inverse_factor"), []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr("sqft.quantization.gptq.inverse_factor", interrupt)
    assert "interrupted" in fails(capsys, 1, "quantize", sparse, tmp_path / "out", *GROUP, *FAST)
    assert len(calls) == 5
    (left,) = tmp_path.iterdir()  # what the same command goes on from
    assert left.name.startswith(".out.compressing-")
