"""Runs in GPTQModel's virtual environment: does the jobs of a JSON file, writes what went wrong, by job, beside it.

A job is ``{"do": "quantize", "folder", "out", "tokens", "options"}`` or ``{"do": "logits", "folder", "out", "tokens"}``;
tokens are a safetensors file with ``ids`` int64 [N, T], logits another with ``logits`` float32 [N, T, V].
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig


def quantize(job: dict) -> None:
    ids = load_file(job["tokens"])["ids"]
    config = QuantizeConfig(device="cpu", offload_to_disk=False, **job["options"])
    model = GPTQModel.load(job["folder"], config, dtype=torch.float32)
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids[:, None]], batch_size=1)
    model.save(job["out"])


@torch.no_grad()
def logits(job: dict) -> None:
    """With the backend "gptq_torch": plain torch; it de-quantizes to float16, and multiplies in float32 here."""
    stored = json.loads((Path(job["folder"]) / "config.json").read_text())["quantization_config"]
    config = GPTQConfig(bits=stored["bits"], backend="gptq_torch")
    model = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=torch.float32, device_map="cpu", quantization_config=config
    ).eval()
    packed = [name for name, module in model.named_modules() if hasattr(module, "qweight")]
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
