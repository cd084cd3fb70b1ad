"""Embeddings and head are stored in half precision beside INT weights, computed in the model's, and saved again as stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pico import pico_model, pico_tokenizer
from safetensors.torch import load_file, save_file

import sqft
from sqft.formats.compact import CompactReader
from sqft.kernels.rows import as_rows, round_rows
from sqft.models import tensors
from sqft.models.embeddings import exact_dtypes, half_dtype
from sqft.models.reader import SafetensorsReader
from sqft.models.tensors import pieces
from sqft.serving.prepare import load_prepared

RTN = {"method": "rtn", "group_size": 32}
EMBEDDING = "model.embed_tokens.weight"


def quantized(tmp_path: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options: object) -> Path:
    sqft.save(pico_model(family, dtype=dtype), pico_tokenizer(), tmp_path / "dense")
    sqft.quantize(tmp_path / "dense", sqft.QuantizeConfig(**RTN, **options), out=tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # tied, and not
def test_a_folder_and_a_live_model_are_rounded_alike(family: str, tmp_path: Path) -> None:
    state = load_file(quantized(tmp_path, family) / "model.safetensors")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    for name in [EMBEDDING, *(["lm_head.weight"] if family == "qwen2" else [])]:
        assert state[name].dtype == torch.float16 and torch.equal(state[name], dense[name].half())
    assert state["model.norm.weight"].dtype == torch.float32
    loaded, tokenizer = sqft.load(tmp_path / "packed")
    assert loaded.get_input_embeddings().weight.dtype == torch.float32
    live = pico_model(family)
    sqft.quantize(live, sqft.QuantizeConfig(**RTN))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(live(tokens).logits, loaded(tokens).logits)
    sqft.save(loaded, tokenizer, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_what_is_half_already_stays_and_keep_keeps(tmp_path: Path) -> None:
    assert half_dtype(pico_model(dtype=torch.bfloat16), "auto") is None
    kept = load_file(quantized(tmp_path, embeddings="keep") / "model.safetensors")
    assert kept[EMBEDDING].dtype == torch.float32
    exact = pico_model(dtype=torch.bfloat16).float()  # nothing is lost by storing it as it was
    assert exact_dtypes(exact)[EMBEDDING] in (torch.bfloat16, torch.float16)


def test_what_float16_does_not_hold_becomes_bfloat16(tmp_path: Path) -> None:
    model = pico_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 4] = 1e6
    assert half_dtype(model, "auto") == torch.bfloat16 and half_dtype(model, "float16") == torch.float16
    sqft.save(model, pico_tokenizer(), tmp_path / "dense")
    sqft.quantize(tmp_path / "dense", sqft.QuantizeConfig(**RTN), out=tmp_path / "packed")
    assert load_file(tmp_path / "packed" / "model.safetensors")[EMBEDDING].dtype == torch.bfloat16


def test_trained_embeddings_are_not_rounded(tmp_path: Path) -> None:
    """An adapter that trains them merges as exactly as ever."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three"}\n')
    packed = quantized(tmp_path, "qwen2")
    model, tokenizer = sqft.load(packed, mask="zeros")
    live = sqft.attach(model, sqft.SqftConfig(r=2, quantization_aware=True, modules_to_save=["lm_head"]))
    with torch.no_grad():
        live.base_model.model.lm_head.modules_to_save["default"].weight.add_(1e-6)
    merged = sqft.merge(live, tokenizer=tokenizer)
    sqft.save(merged, tokenizer, tmp_path / "merged")
    state = load_file(tmp_path / "merged" / "model.safetensors")
    assert state["lm_head.weight"].dtype == torch.float32 and state[EMBEDDING].dtype == torch.float16


def test_the_group_size_is_the_largest_that_fits(tmp_path: Path) -> None:
    def chosen(**sizes: int) -> int:
        model = pico_model(**sizes)
        sqft.quantize(model, sqft.QuantizeConfig(method="rtn"))
        return model.model.layers[0].self_attn.q_proj.stored_group_size

    assert chosen(hidden_size=128, intermediate_size=256, head_dim=32) == 128
    assert chosen(hidden_size=64, intermediate_size=128, head_dim=16) == 64
    assert chosen() == 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_are_integers_times_a_scale_and_come_back(dtype: torch.dtype) -> None:
    w = torch.randn(200, 37) * torch.logspace(-6, 2, 200)[:, None]
    w[3], w[4, 1:] = 0, 0
    rounded = round_rows(w, dtype)
    stored = rounded.to(dtype)
    assert torch.equal(stored.float(), rounded)
    assert (rows := as_rows(stored)) is not None and torch.equal(rows.dense(), stored)
    step = w.abs().amax(1) / 127 * (9 / 8 if dtype == torch.float16 else 2) + 2.0**-24
    assert bool(((rounded - w).abs() <= step[:, None] / 2 * 1.0001).all())
    assert as_rows(torch.randn(200, 37).to(dtype)) is None


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rows_of_bytes_in_compact_folders(family: str, tmp_path: Path) -> None:
    packed = quantized(tmp_path, family, embeddings="int8")
    sqft.pack(packed, out=tmp_path / "small")
    files, before = load_file(tmp_path / "small" / "model.safetensors"), SafetensorsReader(packed)
    assert files["model.embed_tokens.row_values"].dtype == torch.int8 and EMBEDDING not in files
    assert ("lm_head.row_values" in files) == (family == "qwen2")
    reader = CompactReader(tmp_path / "small")
    assert all(torch.equal(reader.get(name), before.get(name)) for name in before.layout)
    sqft.unpack(tmp_path / "small", out=tmp_path / "again")
    again = SafetensorsReader(tmp_path / "again")
    assert again.layout.keys() == before.layout.keys()
    assert all(torch.equal(again.get(name), before.get(name)) for name in before.layout)
    tokens, exact = torch.arange(12)[None], sqft.load(tmp_path / "small")[0]
    fast = load_prepared(tmp_path / "small")[0]
    with torch.no_grad():
        wanted, found = exact(tokens).logits, fast(tokens).logits
    assert getattr(fast.get_output_embeddings(), "bits", 8) == 8
    assert float((found - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())


def test_rows_that_do_not_fit_their_values_are_refused(tmp_path: Path) -> None:
    sqft.pack(quantized(tmp_path, embeddings="int8"), out=tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    state = load_file(file)
    state["model.embed_tokens.row_scales"] = state["model.embed_tokens.row_scales"][1:]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(sqft.SqftError, match="does not fit its values"):
        CompactReader(tmp_path / "small")


@pytest.mark.parametrize("embeddings", ["auto", "int8", "bfloat16"])
def test_rows_are_rounded_some_at_a_time_as_all_at_once(embeddings: str, tmp_path: Path, monkeypatch) -> None:
    whole = load_file(quantized(tmp_path, "qwen2", embeddings=embeddings) / "model.safetensors")
    monkeypatch.setattr(tensors, "PIECE", 100)  # three rows
    assert len(pieces(torch.zeros(260, 32))) == 87 and pieces(torch.zeros(()))[0].ndim == 0
    sqft.quantize(tmp_path / "dense", sqft.QuantizeConfig(**RTN, embeddings=embeddings), out=tmp_path / "pieces")
    parts = load_file(tmp_path / "pieces" / "model.safetensors")
    assert parts.keys() == whole.keys() and all(parts[name].dtype == whole[name].dtype for name in whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    sqft.save(*sqft.load(tmp_path / "pieces"), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)
