"""sqft itself: the kernels and the decoder of ``sqft generate``; adapters beside their base as PEFT computes them."""

from __future__ import annotations

from typing import Any

PACKAGE, EXPORT = "sqft", None


class Session:
    def __init__(self, folder: str, threads: int) -> None:
        import torch

        from sqft.folders import is_adapter, load
        from sqft.serving.decoder import Decoder
        from sqft.serving.prepare import load_prepared

        torch.set_num_threads(threads)
        self._model: Any = (load if is_adapter(folder) else load_prepared)(folder)[0]
        self._decoder: Any = Decoder(self._model) if Decoder.takes(self._model) else None

    def run(self, tokens: list[list[int]], new: int) -> None:
        """Greedily generates exactly ``new`` tokens for each prompt."""
        import torch

        if self._decoder is not None:
            for _ in self._decoder.generate(tokens, new, lambda logits: int(logits.argmax()), set()):
                pass
            return
        ids = torch.tensor(tokens)
        with torch.no_grad():
            self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                 min_new_tokens=new, do_sample=False, pad_token_id=0)  # fmt: skip
