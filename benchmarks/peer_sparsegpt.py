"""llm-compressor's SparseGPT on a Hugging Face folder, for ``bench_sparsify.py``. Runs in its virtual environment.

    HF_HUB_OFFLINE=1 .venv-llmcompressor/bin/python benchmarks/peer_sparsegpt.py MODEL TOKENS OUT

TOKENS: a safetensors file with one int64 tensor [N, T]. OUT gets the pruned model, not compressed. The last line of
standard output is JSON: seconds of the call, and versions.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (ids,) = load_file(options.tokens).values()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    recipe = SparseGPTModifier(
        sparsity=options.sparsity, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"]
    )
    start = time.perf_counter()
    oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=len(ids), max_seq_length=ids.shape[1],
            batch_size=options.batch_size)  # fmt: skip
    seconds = time.perf_counter() - start
    model.save_pretrained(options.out, save_compressed=False)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    print(json.dumps({"seconds": seconds, "version": version("llmcompressor"), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
