"""onnxruntime-genai; the export computes in float32 (``exporters/onnx.py``)."""

from __future__ import annotations

import json
from typing import Any

PACKAGE, EXPORT = "onnxruntime_genai", "onnx"


class Session:
    def __init__(self, folder: str, threads: int) -> None:
        import onnxruntime_genai  # pyright: ignore[reportMissingImports]

        self._genai: Any = onnxruntime_genai
        config = onnxruntime_genai.Config(folder)
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(options))
        self._model = onnxruntime_genai.Model(config)

    def run(self, tokens: list[list[int]], new: int) -> None:
        import numpy as np

        length = len(tokens[0]) + new
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length, batch_size=len(tokens))
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(tokens, dtype=np.int32))
        for _ in range(new):
            generator.generate_next_token()
