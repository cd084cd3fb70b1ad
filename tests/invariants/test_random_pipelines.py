"""Random pipelines: whatever the family, format, precision and adapter, merging keeps zeros, grid and logits."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import FAMILIES, pico_model, pico_tokenizer
from transformers import AutoConfig, Trainer, TrainingArguments

import sqft
from sqft.adapters.peft_bridge import adapter_layers
from sqft.elastic.handle import set_ranks
from sqft.formats.checkpoint import packed_layers
from sqft.models.discover import describe, norms
from sqft.sparsity.masks import mask_of
from sqft.training.data import collate
from sqft.training.initial import from_gradient

DRAWS, FAST = 64, 5
VALUES: dict[str, list[Any]] = {
    "family": list(FAMILIES),
    "bits": [2, 3, 4, 8],
    "format": ["auto", "gptq", "gptq_v2", "compressed-tensors"],
    "symmetric": [False, True],
    "dtype": ["float32", "bfloat16", "float16"],
    "kind": [
        "sparse-peft",
        "lora",
        "qa-sparse-peft",
        "qa-sparse-peft, learnt scales",
        "qa-sparse-peft, dense",
        "scales",
    ],
    "start": ["integers", "fractions"],
    "units": ["weight", "step"],
    "elastic": [False, True],
    "scaling": ["largest", "own"],
    "norms": [False, True],
    "targets": ["", "all"],
    "rslora": [False, True],
    "init": ["default", "gradient"],
    "tied": [False, True],
    "biased": [False, True],
    "sharded": [False, True],
}


@dataclass(frozen=True)
class Draw:
    family: str
    bits: int
    format: str
    symmetric: bool
    dtype: str
    kind: str
    start: str
    units: str
    elastic: bool
    scaling: str
    norms: bool
    targets: str
    rslora: bool
    init: str
    tied: bool
    biased: bool
    sharded: bool

    @property
    def packed(self) -> bool:
        return self.kind.startswith(("qa", "scales"))

    @property
    def masked(self) -> bool:
        return self.kind != "lora"

    def __str__(self) -> str:
        grid = f"INT{self.bits} {self.format}{' symmetric' * self.symmetric}, " * self.packed
        grid += f"{self.start}, {self.units}, " * self.packed
        flags = [name for name in ("elastic", "norms", "rslora", "tied", "biased", "sharded") if getattr(self, name)]
        flags += [f"{self.scaling} scaling"] * (self.scaling == "own")
        flags += [f"{self.targets} targets"] * bool(self.targets) + ["gradient"] * (self.init == "gradient")
        return f"{self.family}, {grid}{', '.join([self.dtype, self.kind, *flags])}"


def make_draws() -> list[Draw]:
    """Each value of each option as often as any other, in an order of its own."""
    columns = {}
    for name, values in VALUES.items():
        columns[name] = (values * DRAWS)[:DRAWS]
        random.Random(name).shuffle(columns[name])
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for row in rows:  # rank 0 is not elastic
        row["elastic"] = row["elastic"] and row["kind"] != "scales"
        row["scaling"] = row["scaling"] if row["elastic"] else "largest"
    for row in rows:  # v1 of the GPTQ format is for symmetric grids
        row["symmetric"] = row["symmetric"] or row["format"] == "gptq"
    return [Draw(**row) for row in rows]


ALL = make_draws()


def test_every_value_is_drawn() -> None:
    assert len(set(ALL)) >= 60
    for name, values in VALUES.items():
        assert {asdict(draw)[name] for draw in ALL} == set(values)


def make_base(draw: Draw, tokens) -> Any:
    plain = AutoConfig.for_model(draw.family).to_dict()
    biases = {name: draw.biased for name in ("attention_bias", "mlp_bias", "enable_bias") if name in plain}
    heads = {"num_key_value_heads": 4} if draw.bits == 3 and "num_key_value_heads" in plain else {}  # whole words
    model = pico_model(draw.family, getattr(torch, draw.dtype), tie_word_embeddings=draw.tied, **biases, **heads)
    if draw.kind not in ("lora", "qa-sparse-peft, dense"):
        sqft.sparsify(model, sqft.SparsifyConfig(sparsity=0.4), tokens)
    if draw.packed:
        config = sqft.QuantizeConfig(bits=draw.bits, group_size=32, symmetric=draw.symmetric, format=draw.format,
                                     act_order=draw.sharded, keep_fractions=draw.start == "fractions")  # fmt: skip
        sqft.quantize(model, config, tokens)
    return model


def begin_along_the_gradient(adapter: Any, tokens) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tokens.tolist()]
    trainer = Trainer(adapter, TrainingArguments(use_cpu=True, report_to=[]), train_dataset=rows,
                      data_collator=partial(collate, fill=0))  # fmt: skip
    from_gradient(trainer, sqft.TrainConfig(batch_size=2))


def make_adapter(draw: Draw, model: Any, tokens) -> Any:
    """Attached and trained for two steps."""
    config = sqft.SqftConfig(
        r=4, lora_alpha=8, search_space=[4, 2] if draw.elastic else None, rank_scaling=draw.scaling,
        quantization_aware=draw.packed,
        sparse_adapter=draw.kind not in ("lora", "qa-sparse-peft, dense"), learn_scales="scales" in draw.kind,
        train_norms=draw.norms, use_rslora=draw.rslora, target_modules=[draw.targets] if draw.targets else None,
        units=draw.units if draw.packed else "weight",
    )  # fmt: skip
    if draw.kind == "scales":
        config = sqft.SqftConfig(kind="scales")
    torch.manual_seed(0)
    adapter = sqft.attach(model, config)
    if draw.init == "gradient" and draw.kind != "scales":
        begin_along_the_gradient(adapter, tokens)
    # Learnt scales are small: a step of the factors' size would be many times as large.
    scales = [p for name, p in adapter.named_parameters() if "lora_scales" in name]
    factors = [p for name, p in adapter.named_parameters() if p.requires_grad and "lora_scales" not in name]
    rate = 0.3 if draw.packed and draw.units == "step" else 0.03  # a step of the grid is 1
    optimizer = torch.optim.AdamW([{"params": factors, "lr": rate}, {"params": scales, "lr": 1e-4}])
    adapter.train()
    for _ in range(2):
        adapter(input_ids=tokens[:2], labels=tokens[:2]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if draw.elastic:
        set_ranks(adapter, {group.name: group.choices[i % 2] for i, group in enumerate(sqft.Elastic(adapter).groups)})
    return adapter.eval()


@pytest.mark.parametrize("draw", [
    pytest.param(draw, id=str(draw), marks=[pytest.mark.slow] if i >= FAST else []) for i, draw in enumerate(ALL)
])  # fmt: skip
def test_a_random_pipeline(draw: Draw, tokens, tmp_path: Path) -> None:
    tokenizer, tokens, folder = pico_tokenizer(), tokens[:4], tmp_path
    sqft.save(make_base(draw, tokens), tokenizer, folder / "base")
    base, _ = sqft.load(folder / "base")
    masks = {weight.name: weight.mask for weight in describe(base).weights() if weight.mask is not None}
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    assert len(masks) == (0 if draw.kind in ("lora", "qa-sparse-peft, dense") else len(describe(base).names()))

    adapter = make_adapter(draw, base, tokens)
    ranks = {group.name: group.choices[i % 2] for i, group in enumerate(sqft.Elastic(adapter).groups)} or None
    sqft.save(adapter, tokenizer, folder / "adapter")
    adapted = list(adapter_layers(adapter))
    expected = {path: layer.merged_packed("default") if draw.packed else None
                for path, layer in adapter_layers(adapter).items()}  # fmt: skip
    with torch.no_grad():
        unmerged = adapter(tokens).logits
        merged = sqft.merge(adapter)
        difference = float((merged(tokens).logits - unmerged).abs().max())
    assert difference == 0 if draw.masked else difference <= 5e-2 * float(unmerged.abs().max())

    # Zeros, grid, and what was not trained.
    for weight in describe(merged).weights():
        if weight.name in masks:
            assert not weight.read()[~masks[weight.name]].any(), weight.name
            assert torch.equal(mask_of(weight.module), masks[weight.name])
    state = merged.state_dict()
    trained = ("qweight", "scales") if "scales" in draw.kind else ("qweight",) if draw.packed else ("weight",)
    trained = ("scales",) if draw.kind == "scales" else trained
    may_change = {f"{path}.{leaf}" for path in adapted for leaf in trained}
    may_change |= {f"{path}.{leaf}" for path in norms(merged) if draw.norms for leaf in ("weight", "bias")}
    changed = {name for name in before if not torch.equal(before[name], state[name])}
    assert changed <= may_change and changed, changed - may_change
    for path, packed in expected.items():
        if packed is not None:
            layer = merged.get_submodule(path)
            assert torch.equal(layer.qweight, packed.qweight) and torch.equal(layer.scales, packed.scales)
            assert int(layer.integers().max()) < 2**draw.bits

    # From disk, and merged from a folder: the same, bit for bit.
    sqft.save(merged, tokenizer, folder / "live")
    config = sqft.MergeConfig(max_shard_size="20KB" if draw.sharded else "5GB")
    metrics = sqft.merge(folder / "adapter", config, ranks=ranks, out=folder / "merged")
    assert metrics["zeros_kept"] == 1.0 and (len(list((folder / "merged").glob("model-*"))) > 1) == draw.sharded
    for name in ("live", "merged"):
        again, _ = sqft.load(folder / name)
        assert len(packed_layers(again)) == len(packed_layers(merged))
        reloaded = again.state_dict()
        assert reloaded.keys() == state.keys()
        assert all(torch.equal(reloaded[key], state[key]) for key in state), name
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, merged(tokens).logits)
