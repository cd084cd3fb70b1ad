"""vLLM, in float16; usually in an environment of its own (``--python vllm=.venv-vllm/bin/python``)."""

from __future__ import annotations

from typing import Any

PACKAGE, EXPORT = "vllm", "vllm"
CHILDREN = True  # it computes in other processes


class Session:
    def __init__(self, folder: str, threads: int) -> None:
        import torch
        import vllm  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        self._vllm: Any = vllm
        self._model = vllm.LLM(
            folder,
            dtype="float16",
            max_model_len=2048,
            enable_prefix_caching=False,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 29,
        )

    def run(self, tokens: list[list[int]], new: int) -> None:
        parameters = self._vllm.SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True)
        self._model.generate([{"prompt_token_ids": each} for each in tokens], parameters, use_tqdm=False)
