"""transformers alone, as a folder loads there, but float16 as bfloat16, which a CPU multiplies faster. Packed ones need
the packages that their format names."""

from __future__ import annotations

from typing import Any

PACKAGE, EXPORT = "transformers", None


class Session:
    def __init__(self, folder: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
        if self._model.dtype == torch.float16:
            self._model.bfloat16()

    def run(self, tokens: list[list[int]], new: int) -> None:
        import torch

        ids = torch.tensor(tokens)
        with torch.no_grad():
            self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                 min_new_tokens=new, do_sample=False, pad_token_id=0)  # fmt: skip
