"""The measure stage: size and speed of what would be served, a model folder or an adapter with its base."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sqft import artifact
from sqft.deployment import MeasureConfig
from sqft.folders import base_of, is_adapter, load
from sqft.formats.checkpoint import packed_layers
from sqft.measuring.size import serving_bytes

PROMPT_TOKENS = 32


def measure(model: str | Path, config: MeasureConfig | None = None, *, out: str | Path | None = None,
            overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Bytes on disk (without masks), decode tokens a second and precision of a folder of any stage."""
    config = config or MeasureConfig()
    with artifact.stage("measure", config, out, model, overwrite=overwrite) as made:
        live, _ = load(model, device=config.device)
        parts = [str(model), base_of(model)] if is_adapter(model) else [str(model)]
        made.metrics.update(
            size=sum(serving_bytes(part) for part in parts if Path(part).exists()),
            decode_tokens_per_second=round(decode_speed(live, config.tokens, config.rounds), 3),
            precision=served_precision(live),
        )
    return made.metrics


def served_precision(model: Any) -> str:
    """Of base and adapter, e.g. 'INT4 + FP32': the paper's 'final precision'."""
    kind = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
    layers = list(packed_layers(model).values())
    own = next(p for name, p in model.named_parameters() if ".lora_" not in name)
    base = f"INT{layers[0].bits}" if layers else kind.get(str(own.dtype).removeprefix("torch."), str(own.dtype))
    if not adapters:
        return base
    return f"{base} + {kind.get(str(adapters[0].dtype).removeprefix('torch.'), str(adapters[0].dtype))}"


@torch.no_grad()
def decode_speed(model: Any, tokens: int = 32, rounds: int = 3) -> float:
    """Tokens a second of greedy decoding, batch 1, after a prompt of 32 tokens: the median of the rounds.

    The prompt's own time is taken out. Packed weights are de-quantized in every step, as they are when such a model is
    used through this package; runtimes with kernels of their own are faster.
    """
    model.eval()
    device = next(model.parameters()).device
    prompt = torch.arange(PROMPT_TOKENS, device=device)[None] % model.config.get_text_config().vocab_size
    seconds = {n: [] for n in (1, tokens + 1)}
    for _ in range(rounds):
        for n, times in seconds.items():
            started = time.perf_counter()
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n,
                           do_sample=False, pad_token_id=0)  # fmt: skip
            times.append(time.perf_counter() - started)
    first, all_of_them = (median(times) for times in seconds.values())
    return tokens / max(all_of_them - first, 1e-9)
