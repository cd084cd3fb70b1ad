"""Exports for other runtimes hold the same weights, or say what they lose; what was damaged is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pico import pico_model, pico_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sqft
from sqft.deployment import ExportConfig
from sqft.errors import SqftError, VerificationError
from sqft.exporters.gguf import Gguf, order
from sqft.exporters.servers import Awq, Mlx, Vllm
from sqft.exporters.source import Source
from sqft.exporters.stage import export
from sqft.models.reader import SafetensorsReader

ASYMMETRIC = {"symmetric": False, "min_zero": 0, "scale_bits": 11}


def quantized(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float16, **options: object) -> Path:
    """A pruned and packed pico model, sparse in part; float16, so that nothing is rounded."""
    extra = {"sliding_window": None} if family == "mistral" else {}
    model = pico_model(family, dtype=dtype, max_position_embeddings=64, **extra)
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=32, **options))  # pyright: ignore[reportArgumentType]
    sqft.save(model, pico_tokenizer(), folder)
    return folder


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    return {module: layer.dequantize() for module, layer in Source(SafetensorsReader(folder)).layers()}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("options", [{"symmetric": True}, {**ASYMMETRIC, "scale_bits": 7}, ASYMMETRIC,
                                     {"symmetric": True, "bits": 8}, {**ASYMMETRIC, "bits": 2}], ids=str)  # fmt: skip
def test_gguf_holds_the_same_weights(family: str, options: dict, tmp_path: Path) -> None:
    """Read by gguf-py alone: names, order of rows, values."""
    import gguf

    source = quantized(tmp_path / "m", family, **options)
    metrics = export(source, ExportConfig(to="gguf"), out=tmp_path / "g")
    assert metrics["exact"]
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "g" / "model.gguf").tensors}
    weights = dequantized(source)
    q = torch.from_numpy(np.array(gguf.dequantize(*_data(tensors["blk.1.attn_q.weight"]))))
    expected = weights["model.layers.1.self_attn.q_proj"]
    if family in ("llama", "mistral"):  # halves of each head of 8 become neighbours
        expected = expected.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
    assert torch.equal(q, expected)
    down = torch.from_numpy(np.array(gguf.dequantize(*_data(tensors["blk.0.ffn_down.weight"]))))
    assert torch.equal(down, weights["model.layers.0.mlp.down_proj"])
    fields = gguf.GGUFReader(tmp_path / "g" / "model.gguf").fields
    assert len(fields["tokenizer.ggml.tokens"].data) == 260


def _data(tensor) -> tuple:
    return tensor.data, tensor.tensor_type


def test_gguf_stores_embeddings_of_bytes_in_bytes(tmp_path: Path) -> None:
    import gguf

    source = quantized(tmp_path / "m", embeddings="int8")
    assert export(source, ExportConfig(to="gguf"), out=tmp_path / "g")["exact"]
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "g" / "model.gguf").tensors}
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"


def test_gguf_of_a_float_model_and_of_bfloat16(tmp_path: Path) -> None:
    model = pico_model(dtype=torch.bfloat16)
    sqft.save(model, pico_tokenizer(), tmp_path / "m")
    assert export(tmp_path / "m", ExportConfig(to="gguf"), out=tmp_path / "g")["exact"]


@pytest.mark.parametrize("to", ["vllm", "awq", "mlx"])
@pytest.mark.parametrize("options", [{"symmetric": True}, {**ASYMMETRIC, "scale_bits": 7}], ids=["symmetric", "not"])
def test_servers_layouts_hold_the_same_weights(to: str, options: dict, tmp_path: Path) -> None:
    source = quantized(tmp_path / "m", "qwen2", **options)  # with biases
    metrics = export(source, ExportConfig(to=to), out=tmp_path / "out")
    assert metrics["exact"] and metrics["weights"] == sum(w.numel() for w in dequantized(source).values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"
    kinds = {"vllm": "gptq" if options["symmetric"] else "compressed-tensors", "awq": "awq", "mlx": None}
    assert config["quantization_config"].get("quant_method") == kinds[to]
    if to == "vllm":
        assert all(torch.equal(w, dequantized(source)[m]) for m, w in dequantized(tmp_path / "out").items())


@pytest.mark.parametrize(("target", "tensor"), [(Vllm, "qweight"), (Awq, "qzeros"), (Mlx, "scales")])
def test_a_damaged_export_is_noticed(target, tensor: str, tmp_path: Path) -> None:
    reader = SafetensorsReader(quantized(tmp_path / "m", symmetric=True))
    (tmp_path / "out").mkdir()
    target().write(reader, tmp_path / "out")
    state = load_file(file := tmp_path / "out" / "model.safetensors")
    name = next(name for name in state if name.endswith(tensor))
    state[name] = state[name].roll(1, -1) if tensor == "scales" else state[name] ^ 1
    save_file(state, file)
    if target is Mlx:
        assert target().verify(reader, tmp_path / "out")["largest_weight_error"] > 0
    else:
        with pytest.raises(VerificationError, match="not written exactly"):
            target().verify(reader, tmp_path / "out")


def test_a_damaged_gguf_is_noticed(tmp_path: Path) -> None:
    reader = SafetensorsReader(quantized(tmp_path / "m", symmetric=True))
    (tmp_path / "out").mkdir()
    Gguf().write(reader, tmp_path / "out")
    content = bytearray((file := tmp_path / "out" / "model.gguf").read_bytes())
    content[-3] ^= 0x11
    file.write_bytes(content)
    with pytest.raises(VerificationError, match="not written exactly"):
        Gguf().verify(reader, tmp_path / "out")


def test_what_would_be_lost_is_said_and_needs_consent(tmp_path: Path) -> None:
    source = quantized(tmp_path / "m", dtype=torch.float32, **ASYMMETRIC)  # float32 norms
    with pytest.raises(SqftError, match=r"rounding to float16 changes values by up to .*norm.*--allow-lossy"):
        export(source, ExportConfig(to="awq"), out=tmp_path / "out")
    with pytest.raises(SqftError, match=r"-s z rounded to float16 changes weights by up to"):
        export(source, ExportConfig(to="mlx"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    metrics = export(source, ExportConfig(to="mlx", allow_lossy=True), out=tmp_path / "out")
    assert not metrics["exact"] and 0 < metrics["largest_weight_error"] < 1e-2


def test_what_a_target_cannot_hold_is_refused_with_a_fix(tmp_path: Path) -> None:
    three = quantized(tmp_path / "three", symmetric=True, bits=2)
    with pytest.raises(SqftError, match="AWQ reads 4 bits in groups of .* has 2 in groups of 32: quantize again"):
        export(three, ExportConfig(to="awq"), out=tmp_path / "out")
    eight = quantized(tmp_path / "eight", bits=8, **ASYMMETRIC)
    with pytest.raises(SqftError, match="no GGUF block of .* holds .* exactly: quantize again, symmetric"):
        export(eight, ExportConfig(to="gguf"), out=tmp_path / "out")
    gemma = pico_model("gemma")
    sqft.save(gemma, pico_tokenizer(), tmp_path / "gemma")
    with pytest.raises(SqftError, match="GGUF files of gemma models are not written, only of llama, mistral"):
        export(tmp_path / "gemma", ExportConfig(to="gguf"), out=tmp_path / "out")
    with pytest.raises(SqftError, match="AWQ is a layout of INT4 weights"):
        export(tmp_path / "gemma", ExportConfig(to="awq"), out=tmp_path / "out")
    window = pico_model("mistral")
    sqft.save(window, pico_tokenizer(), tmp_path / "window")
    with pytest.raises(SqftError, match="sliding window"):
        export(tmp_path / "window", ExportConfig(to="gguf"), out=tmp_path / "out")


def test_rows_of_q_and_k_go_in_pairs(tmp_path: Path) -> None:
    """llama.cpp rotates row 2i with 2i + 1 of a head, transformers i with i + half."""
    source = Source(SafetensorsReader(quantized(tmp_path / "m", symmetric=True)))
    assert order(source, "model.layers.0.self_attn.q_proj", 32)[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert order(source, "model.layers.0.self_attn.v_proj", 16).tolist() == list(range(16))


def test_experts_in_int_are_refused_and_in_float_are_as_transformers_has_them(tmp_path: Path) -> None:
    model = pico_model("qwen3_moe")
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    sqft.save(model, pico_tokenizer(), tmp_path / "float")
    assert export(tmp_path / "float", ExportConfig(to="transformers"), out=tmp_path / "out")["exact"]
    stock, prompt = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(stock(prompt).logits, model(prompt).logits, atol=1e-5)
    sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=32))
    sqft.save(model, pico_tokenizer(), tmp_path / "int4")
    for to in ("vllm", "transformers"):
        with pytest.raises(SqftError, match="experts in INT"):
            export(tmp_path / "int4", ExportConfig(to=to), out=tmp_path / to)
