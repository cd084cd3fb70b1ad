"""Runs in .venv-runtimes: exports a model folder for each target, loads it in the target's runtime, and prints as JSON how
far its logits and greedy tokens are from those of sqft's exact forward.

    python runtimes_worker.py MODEL WORK [TARGET ...] [vllm=PYTHON]

What a target refuses is {"refused": why}. vLLM runs in an environment of its own, whose interpreter is named.
"""

from __future__ import annotations

import json
import subprocess
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

    settings = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
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


def gguf(folder: Path, tokens: list[int]) -> tuple[np.ndarray, list[int]]:
    from llama_cpp import Llama

    model = Llama(str(folder / "model.gguf"), n_ctx=256, n_threads=2, logits_all=True, verbose=False)
    model.eval(tokens)
    logits = np.array(model.scores[len(tokens) - 1])
    found = []
    for _ in range(STEPS):
        found.append(int(model.sample(temp=0.0)))
        model.eval([found[-1]])
    return logits, found


def vllm(folder: Path, tokens: list[int], python: str) -> tuple[np.ndarray, list[int]]:
    worker = Path(__file__).with_name("vllm_worker.py")
    command = [python, str(worker), str(folder), json.dumps(tokens), str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    return np.array(found["logits"]), found["greedy"]


RUNTIMES = {"openvino": openvino, "onnx": onnx, "mlx": mlx, "gguf": gguf}


def main(model: Path, work: Path, targets: list[str]) -> None:
    live, tokenizer = sqft.load(model)
    live.float()
    tokens = tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        expected = live(torch.tensor([tokens])).logits[0, -1].numpy()
        greedy = live.generate(torch.tensor([tokens]), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
                               pad_token_id=0)[0, len(tokens) :].tolist()  # fmt: skip
    results = {}
    for target in targets:
        name, _, python = target.partition("=")
        try:
            exported = export(model, ExportConfig(to=name), out=work / name, overwrite=True)
        except sqft.SqftError as error:
            results[name] = {"refused": str(error)}
            continue
        elsewhere = {"vllm": vllm, "awq": vllm}.get(name)
        logits, found = elsewhere(work / name, tokens, python) if elsewhere else RUNTIMES[name](work / name, tokens)
        error = float(np.abs(logits - expected).max() / np.abs(expected).max())
        results[name] = {"exact": exported["exact"], "logits": error, "greedy": found == greedy}
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or ["openvino", "onnx", "mlx"])
