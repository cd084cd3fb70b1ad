"""SmolLM2-135M-Instruct as it comes from PyPI: a GGUF file, de-quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sqft
from sqft.models.discover import describe
from sqft.recipe import resolve_model


@pytest.mark.slow
def test_gguf_loads_and_is_saved_as_an_ordinary_folder(tmp_path: Path) -> None:
    source = resolve_model("demo-model")
    model, tokenizer = sqft.load(source)
    assert len(describe(model).blocks) == 30 and model.dtype == torch.float32
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
        assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
        sqft.save(model, tokenizer, tmp_path / "dense")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
        assert torch.equal(again(ids).logits, logits)
    (gguf,) = Path(source).glob("*.gguf")
    assert torch.equal(sqft.load(gguf)[0].lm_head.weight, model.lm_head.weight)
