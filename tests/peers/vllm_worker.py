"""Runs in .venv-vllm: raw logits after a prompt, and greedy tokens, of a folder, as JSON.

python vllm_worker.py FOLDER TOKENS STEPS
"""

from __future__ import annotations

import json
import sys


def main(folder: str, tokens: list[int], steps: int) -> None:
    from vllm import LLM, SamplingParams

    model = LLM(folder, dtype="float16", max_model_len=256, enforce_eager=True, kv_cache_memory_bytes=1 << 28,
                logprobs_mode="raw_logits", max_logprobs=-1)  # fmt: skip
    parameters = SamplingParams(temperature=0, max_tokens=steps, min_tokens=steps, ignore_eos=True, logprobs=-1)
    (out,) = model.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)
    first = out.outputs[0].logprobs[0]
    logits = [first[token].logprob for token in sorted(first)]
    print(json.dumps({"logits": logits, "greedy": list(out.outputs[0].token_ids)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
