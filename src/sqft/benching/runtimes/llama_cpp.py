"""llama.cpp, by llama-cpp-python; one prompt at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PACKAGE, EXPORT = "llama_cpp", "gguf"


class Session:
    def __init__(self, folder: str, threads: int) -> None:
        from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

        file = next(Path(folder).glob("*.gguf"))
        self._model: Any = Llama(str(file), n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(self, tokens: list[list[int]], new: int) -> None:
        if len(tokens) > 1:
            raise NotImplementedError("llama-cpp-python decodes one prompt at a time")
        self._model.reset()
        self._model.eval(tokens[0])
        for _ in range(new - 1):
            self._model.eval([self._model.sample(temp=0.0)])
        self._model.sample(temp=0.0)
