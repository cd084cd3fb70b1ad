"""Runs in .venv-runtimes: exports a model folder for each runtime, loads it there, and prints as JSON how far its logits
and greedy tokens are from those of sqft's exact forward.

    python runtimes_worker.py MODEL WORK
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

import sqft
from sqft.deployment import ExportConfig
from sqft.exporters.stage import export

PROMPT = "The quick brown fox jumps"
STEPS = 8


def openvino(folder: Path, tokens: list[int]) -> tuple[np.ndarray, list[int]]:
    import openvino as ov
    import openvino_genai

    settings = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", settings).create_infer_request()
    ids = np.array([tokens], dtype=np.int64)
    request.infer({"input_ids": ids, "attention_mask": np.ones_like(ids), "beam_idx": np.zeros(1, dtype=np.int32),
                   "position_ids": np.arange(len(tokens))[None]})  # fmt: skip
    logits = np.array(request.get_tensor("logits").data)[0, -1]
    config = openvino_genai.GenerationConfig(max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
                                             apply_chat_template=False)  # fmt: skip
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **settings)
    return logits, list(pipeline.generate(ov.Tensor(ids), config).tokens[0])


def onnx(folder: Path, tokens: list[int]) -> tuple[np.ndarray, list[int]]:
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(tokens) + STEPS, min_length=len(tokens) + STEPS)
    generator = og.Generator(model, parameters)
    generator.append_tokens(tokens)
    logits = np.array(generator.get_logits()).reshape(-1, np.array(generator.get_logits()).shape[-1])[-1]
    while not generator.is_done():
        generator.generate_next_token()
    return logits, [int(token) for token in generator.get_sequence(0)[len(tokens) :]]


def mlx(folder: Path, tokens: list[int]) -> tuple[np.ndarray, list[int]]:
    import mlx.core as mx
    from mlx_lm import load

    model, _ = load(str(folder))
    model.set_dtype(mx.float32)
    found = list(tokens)
    logits = np.array(model(mx.array([found])))[0, -1]
    for _ in range(STEPS):
        found.append(int(np.array(model(mx.array([found])))[0, -1].argmax()))
    return logits, found[len(tokens) :]


def main(model: Path, work: Path) -> None:
    live, tokenizer = sqft.load(model)
    live.float()
    tokens = tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        expected = live(torch.tensor([tokens])).logits[0, -1].numpy()
        greedy = live.generate(torch.tensor([tokens]), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
                               pad_token_id=0)[0, len(tokens) :].tolist()  # fmt: skip
    results = {}
    for name, runtime in {"openvino": openvino, "onnx": onnx, "mlx": mlx}.items():
        exported = export(model, ExportConfig(to=name), out=work / name, overwrite=True)
        logits, found = runtime(work / name, tokens)
        error = float(np.abs(logits - expected).max() / np.abs(expected).max())
        results[name] = {"exact": exported["exact"], "logits": error, "greedy": found == greedy}
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
