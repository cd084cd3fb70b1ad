"""A model of sqft as lm-evaluation-harness takes one. Imports lm-eval: import this module only where it is wanted."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lm_eval.models import huggingface

from sqft import artifact
from sqft.elastic.handle import set_ranks
from sqft.elastic.heuristics import resolve_ranks
from sqft.errors import UsageError
from sqft.evaluation.choices import likelihoods
from sqft.evaluation.scoring import unpacked
from sqft.folders import load

_HFLM: Any = huggingface.HFLM  # lm-eval's decorator hides its type
_LOADING = {"peft", "delta", "parallelize", "tp_plan", "autogptq", "gptqmodel", "gguf_file", "load_in_4bit",
            "load_in_8bit", "trust_remote_code", "revision", "subfolder"}  # fmt: skip


class SqftLM(_HFLM):
    """``--model sqft``: any stage's folder (dense, sparse, packed, adapter, super-adapter), a GGUF file or a hub name.

    Args:
        pretrained: that folder, file or name; or a live model, with its ``tokenizer``, which stays as it is.
        ranks: of a super-adapter: a heuristic (median, say) or a YAML file; default: the largest.
        dtype: 'auto' (as stored), 'float32', 'bfloat16' or 'float16'.
        unpack: hold packed weights de-quantized, and masked adapters merged: the same results, faster.
        share: read a context once for all its continuations: the same results, faster.
        softmax_dtype: of log-probabilities. float32, as in sqft's own scorer: bfloat16 would make near ties equal.
        others: what lm-eval's ``hf`` takes besides, e.g. ``max_length``.

    Raises UsageError for ranks that do not fit, and for options that are about loading and are not sqft's.
    """

    def __init__(self, pretrained: Any, tokenizer: Any = None, ranks: str | None = None, dtype: str = "auto",
                 unpack: bool = True, share: bool = True, batch_size: int | str = 1, device: str | None = None,
                 softmax_dtype: str = "float32", **others: Any) -> None:  # fmt: skip
        wrong = _LOADING & others.keys()
        if wrong:
            raise UsageError(f"'{min(wrong)}' is an option of --model hf: --model sqft loads by pretrained, ranks, "
                             "dtype, unpack")  # fmt: skip
        self._source = pretrained if isinstance(pretrained, (str, Path)) else None
        self._share = share
        self._held = contextlib.ExitStack()  # what unpack changed stays so as long as this object lives
        model = pretrained
        if self._source is not None:
            # lm-eval's command line says cuda:0 where none was asked for, also where there is none.
            model, own = load(self._source, dtype=dtype, device="auto" if device in (None, "cuda:0") else device)
            tokenizer = tokenizer or own
            if ranks is not None:
                set_ranks(model, resolve_ranks(model, ranks, self._source))
            if unpack:
                self._held.enter_context(unpacked(model))
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size,
                         softmax_dtype=softmax_dtype, **others)  # fmt: skip

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
                              override_bs: int | None = None) -> list[tuple[float, bool]]:  # fmt: skip
        size = override_bs or self.batch_size
        if not self._share or not isinstance(size, int):  # 'auto' is lm-eval's to find
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        longest = self.max_length + 1  # nothing follows the last token
        pairs = [((context + tail)[-longest:], len(tail)) for _, context, tail in requests]
        answers = likelihoods(self.model, pairs, size, quiet=disable_tqdm)
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:  # lm-eval's cache of answers
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """What goes into results.json: parameters, dtype, and of a stage folder its stage and key."""
        parameters = sum(p.numel() for p in self.model.parameters())
        info: dict[str, Any] = {"model_num_parameters": parameters, "model_dtype": str(self.model.dtype)}
        if self._source is not None and artifact.is_stage(self._source):
            manifest = artifact.read_manifest(self._source)
            info.update(model_stage=manifest.stage, model_key=manifest.key)
        return info
