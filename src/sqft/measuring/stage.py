"""The measure stage: size and speed of what would be served, a model folder or an adapter with its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqft import artifact
from sqft.config import MeasureConfig
from sqft.folders import base_of, is_adapter, load
from sqft.formats.checkpoint import packed_layers
from sqft.measuring.size import serving_bytes
from sqft.measuring.speed import decode_speed


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
            precision=precision(live),
        )
    return made.metrics


def precision(model: Any) -> str:
    """Of base and adapter, e.g. 'INT4 + FP32': the paper's 'final precision'."""
    kind = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
    layers = list(packed_layers(model).values())
    own = next(p for name, p in model.named_parameters() if ".lora_" not in name)
    base = f"INT{layers[0].bits}" if layers else kind.get(str(own.dtype).removeprefix("torch."), str(own.dtype))
    if not adapters:
        return base
    return f"{base} + {kind.get(str(adapters[0].dtype).removeprefix('torch.'), str(adapters[0].dtype))}"
