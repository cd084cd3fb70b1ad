"""One model of a family through all stages; what ``docs/families.md`` says of each is what this found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pico import FAMILIES, pico_folder, pico_model
from torch import Tensor, nn

import sqft
from sqft.models.discover import CONVOLUTIONS, describe
from sqft.models.weights import is_linear

KEPT = ("shared_expert_gate", "dt_proj", "x_proj", "in_proj_ba", "router.proj", "modality_router", "prediction_coefs",
        "correction_coefs", "linear_left", "linear_right")  # gates, what makes a state, AltUp, LAuReL  # fmt: skip
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "head_dim": 16,
}  # for 32:64
TRAIN = {"max_steps": 2, "batch_size": 4, "r": 4, "lora_alpha": 8, "learning_rate": 0.02}


def matrices(model: Any) -> Iterator[Tensor]:
    """Every weight of the blocks that multiplies, found without the table of families: what has two or more dimensions,
    and is no convolution, no router and no part of a state."""
    for block in describe(model).blocks:
        for name, module in block.module.named_modules():
            if name.endswith(KEPT) or "Router" in type(module).__name__:
                continue
            if is_linear(module) and hasattr(module, "qweight"):
                yield module.dequantize()
            elif not isinstance(module, CONVOLUTIONS):
                yield from (p for leaf, p in module.named_parameters(recurse=False) if p.ndim >= 2 and leaf != "A_log")


def zeros(model: Any) -> float:
    found = list(matrices(model))
    return sum(int((w == 0).sum()) for w in found) / sum(w.numel() for w in found)


def check_untouched(dense: Any, merged: Any) -> None:
    """All that is no weight of the blocks, what a model sees with included, is what it was, bit for bit."""
    changed = {f"{name}.weight" for name in describe(merged).names()}
    before, after = (dict((*model.named_parameters(), *model.named_buffers())) for model in (dense, merged))
    kept = [name for name in before if name not in changed]
    assert len(kept) > 2 and all(torch.equal(before[name], after[name]) for name in kept)


def go_through(family: str, folder: Path, tokens: Tensor, examples: list[sqft.Example]) -> dict[str, Any]:
    """Raises if a stage does not do what it says."""
    wide = {size: value for size, value in WIDE.items() if size in FAMILIES.get(family, {})}
    for pattern, method in (("2:4", "sparsegpt"), ("32:64", "magnitude")):
        live = pico_model(family, **wide)
        told = sqft.sparsify(live, sqft.SparsifyConfig(pattern=pattern, method=method), tokens)
        assert told["sparsity"] == zeros(live) == 0.5, pattern
    pico_folder(folder / "dense", family, **wide)
    told = sqft.sparsify(folder / "dense", sqft.SparsifyConfig(batch_size=4), tokens, out=folder / "sparse")
    sparse = sqft.load(folder / "sparse")[0]
    assert told["sparsity"] == zeros(sparse) and abs(told["sparsity"] - 0.5) < 0.01
    quantized = sqft.quantize(folder / "sparse", sqft.QuantizeConfig(group_size=32), tokens, out=folder / "int4")
    assert quantized["zeros_kept"] == 1.0 and quantized["sparsity"] == zeros(sqft.load(folder / "int4")[0])

    def train(base: str, kind: str, **options: Any) -> None:
        config = sqft.TrainConfig(adapter=kind, **{**TRAIN, **options})
        sqft.train(folder / base, config, examples, out=folder / f"{base}-{kind}")

    train("sparse", "sparse-peft", search_space=[4, 2])
    search = sqft.SearchConfig(evaluations=2, metric="loss", strategy="hill-climb", task="arithmetic", limit=4)
    sqft.search(folder / "sparse-sparse-peft", search, out=folder / "found")
    train("int4", "qa-sparse-peft", target_modules=["all"])
    train("sparse", "lora", search_space=[4, 2])
    train("int4", "sqft")
    sqft.train(folder / "sparse", sqft.TrainConfig(adapter="sparse-full", max_steps=2, batch_size=4), examples,
               out=folder / "full")  # fmt: skip
    assert zeros(sqft.load(folder / "full")[0]) == told["sparsity"]
    for adapter, merged in (("found", "merged"), ("int4-qa-sparse-peft", "merged-int4")):
        metrics = sqft.merge(folder / adapter, out=folder / merged)
        assert metrics["zeros_kept"] == 1.0 and metrics["max_logit_difference"] < 1e-4
    live = sqft.load(folder / "merged")[0]
    assert zeros(live) == told["sparsity"]
    check_untouched(sqft.load(folder / "dense")[0], live)
    for merged in ("merged", "merged-int4"):
        assert sqft.generate(folder / merged, "hello", sqft.GenerateConfig(max_new_tokens=4))["tokens"] >= 1
    blocks = describe(sparse)
    kinds = {type(w.module).__name__ for w in blocks.weights()}
    return {"row": blocks.family.name, "blocks": blocks.family.blocks, "layers": sorted(kinds - {"Linear"}),
            "weights": [len(block.weights) for block in blocks.blocks], "differ": bool(blocks.family.either),
            "sparsity": told["sparsity"], "convolutions": any(isinstance(m, nn.Conv1d) for block in blocks.blocks for m in block.module.modules()),
            "experts": any(".experts." in name for name in blocks.names()), "sees": hasattr(sparse.config, "vision_config"),
            "parameters": sum(w.numel() for w in matrices(sparse))}  # fmt: skip


def tokens() -> Tensor:
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
