"""The measure stage: size and speed of what would be served, a model folder or an adapter with its base."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sqft import artifact
from sqft.config import MeasureConfig
from sqft.folders import base_of, is_adapter, load
from sqft.formats.checkpoint import packed_layers
from sqft.measuring.size import serving_bytes
from sqft.measuring.speed import decode_speed
from sqft.options import to_dict


def measure(model: str | Path, config: MeasureConfig | None = None, *, out: str | Path | None = None,
            overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Bytes on disk (without masks), decode tokens a second and precision of a folder of any stage."""
    config = config or MeasureConfig()
    if out is not None:
        artifact.check_output(out, overwrite)
    started = time.perf_counter()
    live, _ = load(model)
    parts = [str(model), base_of(model)] if is_adapter(model) else [str(model)]
    metrics = {
        "size": sum(serving_bytes(part) for part in parts if Path(part).exists()),
        "decode_tokens_per_second": round(decode_speed(live, config.tokens, config.rounds), 3),
        "precision": precision(live),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if out is not None:
        with artifact.writing(out, overwrite) as folder:
            artifact.write_manifest(folder, artifact.Manifest(
                stage="measure", config=to_dict(config), metrics=metrics, parent=artifact.relative_parent(model, out),
                parent_key=artifact.folder_key(model),
            ))  # fmt: skip
    return metrics


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
