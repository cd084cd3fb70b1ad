"""Exports in the real runtimes (.venv-runtimes and .venv-vllm, made by ``make peers``): the same logits, the same greedy tokens."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sqft

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-runtimes" / "bin" / "python"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (PYTHON.parents[1] / "done").is_file(),
                                                   reason="no .venv-runtimes: make peers makes it")]  # fmt: skip


def tokenizer_with_merges() -> PreTrainedTokenizerFast:
    """Bytes, and two words made of them: OpenVINO's reader wants merges."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    model = models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[("t", "h"), ("th", "e")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>"})
    return fast


def answers(folder: Path, *targets: str) -> dict[str, Any]:
    """What the runtimes answer after each export of ``folder/model``."""
    command = [PYTHON, ROOT / "tests" / "peers" / "runtimes_worker.py", folder / "model", folder / "work", *targets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("family", "options"), [
    ("llama", {"symmetric": True}), ("qwen3", {"symmetric": False, "min_zero": 1, "scale_bits": 7}),
    ("llama", {"symmetric": True, "embeddings": "int8"}),
], ids=["llama, symmetric", "qwen3, not", "llama, embeddings of bytes"])  # fmt: skip
def test_runtimes_answer_as_sqft_does(family: str, options: dict, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # onnxruntime wants heads of 16
    model = pico_model(family, dtype=torch.float16, vocab_size=261, rope_theta=1e5, pad_token_id=260, bos_token_id=259,
                       eos_token_id=258, **sizes)  # fmt: skip
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=32, **options))
    sqft.save(model, tokenizer_with_merges(), tmp_path / "model")
    found = answers(tmp_path)
    assert found.keys() == {"openvino", "onnx", "mlx"} and all(each["exact"] for each in found.values())
    assert all(each["logits"] < 1e-4 and each["greedy"] for each in found.values()), found


@pytest.mark.skipif(not (ROOT / ".venv-vllm" / "done").is_file(), reason="no .venv-vllm: make peers makes it")
def test_vllm_answers_as_sqft_does(tmp_path: Path) -> None:
    """Floats: for INT4 vLLM has kernels on processors with AVX-512 alone, where benchmarks/bench_runtimes.py measures it."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 2,
             "num_key_value_heads": 2}  # fmt: skip
    model = pico_model("llama", dtype=torch.float16, vocab_size=261, pad_token_id=260, bos_token_id=259, eos_token_id=258,
                       **sizes)  # fmt: skip
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    sqft.save(model, tokenizer_with_merges(), tmp_path / "model")
    found = answers(tmp_path, f"vllm={ROOT / '.venv-vllm' / 'bin' / 'python'}")["vllm"]
    assert found["exact"] and found["greedy"] and found["logits"] < 1e-2, found
