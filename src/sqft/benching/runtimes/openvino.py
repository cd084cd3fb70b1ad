"""OpenVINO GenAI, with its own choice of precision on a CPU."""

from __future__ import annotations

from typing import Any

PACKAGE, EXPORT = "openvino_genai", "openvino"


class Session:
    def __init__(self, folder: str, threads: int) -> None:
        import openvino_genai  # pyright: ignore[reportMissingImports]

        self._genai: Any = openvino_genai
        self._pipeline = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)

    def run(self, tokens: list[list[int]], new: int) -> None:
        import numpy as np
        import openvino  # pyright: ignore[reportMissingImports]

        ids = np.array(tokens, dtype=np.int64)
        config = self._genai.GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False,
                                              ignore_eos=True, apply_chat_template=False)  # fmt: skip
        given = self._genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        self._pipeline.generate(given, config)
