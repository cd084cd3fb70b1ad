"""Runs in llm-compressor's virtual environment: does the jobs of a JSON file, writes what went wrong, by job, beside it.

A job is ``{"do": "quantize", "folder", "out", "tokens", "weights", "modifier"}`` or
``{"do": "logits", "folder", "out", "tokens"}``; tokens are a safetensors file with ``ids`` int64 [N, T], logits another
with ``logits`` float32 [N, T, V]; ``weights`` are compressed-tensors' QuantizationArgs.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS = {"gptq": GPTQModifier, "rtn": QuantizationModifier}


def quantize(job: dict) -> None:
    ids = load_file(job["tokens"])["ids"]
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**job["weights"]))
    recipe = MODIFIERS[job["modifier"]](config_groups={"group_0": scheme}, ignore=["lm_head"])
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=len(ids), max_seq_length=ids.shape[1])
    model.save_pretrained(job["out"], save_compressed=True)
    AutoTokenizer.from_pretrained(job["folder"]).save_pretrained(job["out"])


@torch.no_grad()
def logits(job: dict) -> None:
    """De-quantized and multiplied in float32."""
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).eval()
    packed = [name for name, _ in model.named_parameters() if name.endswith("weight_packed")]
    assert packed, "no module was loaded packed"
    save_file({"logits": model(load_file(job["tokens"])["ids"]).logits.float().contiguous()}, job["out"])


def main() -> None:
    torch.set_num_threads(2)
    file = Path(sys.argv[1])
    errors = {}
    for name, job in json.loads(file.read_text()).items():
        try:
            {"quantize": quantize, "logits": logits}[job["do"]](job)
        except Exception:
            errors[name] = traceback.format_exc()
    file.with_suffix(".errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
