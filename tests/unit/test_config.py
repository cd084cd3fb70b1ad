"""Configs, the registry, stage folders, model discovery, the public API."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pico import FAMILIES, pico_model
from torch import nn

import sqft
from sqft.compressing.passes import patterns
from sqft.config import EvaluateConfig, MergeConfig, SparsifyConfig, TrainConfig
from sqft.models.discover import describe, resolve_targets
from sqft.models.tensors import ModelWriter, layout
from sqft.options import from_dict, parse_size, to_dict
from sqft.registry import Registry
from sqft.sparsity.pattern import Pattern

CONFIGS = (SparsifyConfig, TrainConfig, MergeConfig, EvaluateConfig)


def test_import_does_no_work() -> None:
    code = "import sys, sqft; dir(sqft); assert 'torch' not in sys.modules; import sqft.cli; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_exist() -> None:
    for name in sqft.__all__:
        assert getattr(sqft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        sqft.quantise  # noqa: B018


def test_type_checkers_see_the_public_names() -> None:
    stub = (Path(sqft.__file__).parent / "__init__.pyi").read_text()
    assert set(re.findall(r" as (\w+)$", stub, re.MULTILINE)) == set(sqft.__all__)


@pytest.mark.parametrize("cls", CONFIGS)
def test_configs_are_frozen_documented_and_survive_a_round_trip(cls) -> None:
    needed = {"task": "arithmetic"} if cls is EvaluateConfig else {}
    config = cls(**needed)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert all(spec.metadata.get("help") for spec in dataclasses.fields(cls))
    assert from_dict(cls, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (SparsifyConfig, {"sparsity": 0}, "sparsity is 0.0: it has to be greater than 0"),
        (SparsifyConfig, {"sparsity": True}, "is not of type float"),
        (SparsifyConfig, {"samples": 2.5}, "not a whole number"),
        (SparsifyConfig, {"overrides": {"q_proj": 2}}, "override 'q_proj' is 2"),
        (SparsifyConfig, {"pattern": "2:"}, "not N:M"),
        (TrainConfig, {"scheduler": "cosin"}, "did you mean 'cosine'"),
        (TrainConfig, {"lora_dropout": 1}, "lora_dropout is 1.0: it has to be less than 1"),
        (TrainConfig, {"completion_only": "yes"}, "is not of type bool"),
        (TrainConfig, {"lerning_rate": 1}, "did you mean 'learning_rate'"),
        (MergeConfig, {"max_shard_size": "5 gigs"}, "is not a size"),
        (EvaluateConfig, {}, "nothing to evaluate"),
    ],
)
def test_wrong_options(cls, values: dict, message: str) -> None:
    with pytest.raises(sqft.UsageError, match=message):
        from_dict(cls, values)


def test_parse_size() -> None:
    assert [parse_size(s) for s in ("5GB", "1.5MB", "20kb")] == [5 * 10**9, 1_500_000, 20_000]


def test_registry_suggests() -> None:
    registry = Registry("method", "sqft.tests", {"wanda": "sqft.sparsity.wanda:wanda"})
    assert registry["wanda"].function.__name__ == "wanda"
    with pytest.raises(sqft.UsageError, match="unknown method 'wand': did you mean 'wanda'"):
        registry["wand"]


def test_writer_refuses_what_was_not_planned(tmp_path: Path) -> None:
    writer = ModelWriter(layout(nn.Linear(3, 2)), tmp_path, 10**9)
    writer.add("weight", torch.ones(2, 3))
    with pytest.raises(sqft.SqftError, match="planned was"):
        writer.add("bias", torch.ones(3))
    with pytest.raises(sqft.SqftError, match="1 tensors were not written, e.g. bias"):
        writer.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_are_the_papers_five_or_what_fuses_them(family: str) -> None:
    architecture = describe(pico_model(family))
    leaves = {name.rsplit(".", 1)[1] for name in resolve_targets(architecture, [])}
    assert leaves == set(architecture.family.targets)
    names = architecture.names()
    assert len(names) == 2 * len(architecture.family.linears) and not any("lm_head" in name for name in names)


def test_discovery_checks_the_live_model() -> None:
    model = pico_model()
    model.model.layers[1].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(sqft.SqftError, match=r"model.layers.1 .* also has mlp.extra"):
        describe(model)
    model = pico_model()
    model.model.layers[0].mlp.up_proj = nn.Identity()
    with pytest.raises(sqft.SqftError, match=r"lacks mlp.up_proj"):
        describe(model)
    model.config.model_type = "lama"
    with pytest.raises(sqft.SqftError, match="did you mean 'llama'"):
        describe(model)
    with pytest.raises(sqft.SqftError, match="not a transformers model"):
        describe(nn.Linear(2, 2))


def test_overrides_and_exclusions() -> None:
    architecture = describe(pico_model())
    config = SparsifyConfig(pattern="2:4", overrides={"down_proj": 0.25}, exclude=["model.layers.0.*"])
    plan = patterns(architecture, config)
    assert plan["model.layers.1.mlp.down_proj"] == Pattern(0.25)
    assert plan["model.layers.1.mlp.up_proj"] == Pattern.parse("2:4")
    assert not any(name.startswith("model.layers.0.") for name in plan)
    model = pico_model()
    metrics = sqft.sparsify(
        model, SparsifyConfig(method="magnitude", overrides={"down_proj": 0.25}, exclude=["o_proj"])
    )
    assert metrics["by_module"]["model.layers.0.mlp.down_proj"] == 0.25
    assert metrics["by_module"]["model.layers.1.self_attn.o_proj"] == 0
    assert metrics["by_module"]["model.layers.1.self_attn.q_proj"] == 0.5
    with pytest.raises(sqft.UsageError, match="every module is excluded"):
        patterns(architecture, SparsifyConfig(exclude=["*"]))
    with pytest.raises(sqft.UsageError, match="prunes nothing"):
        patterns(architecture, SparsifyConfig(sparsity=0.001))


def test_live_calls_that_lack_something(tokens) -> None:
    model = pico_model()
    with pytest.raises(sqft.UsageError, match="needs a tokenizer"):
        sqft.sparsify(model)
    with pytest.raises(sqft.UsageError, match="int64"):
        sqft.sparsify(model, calibration=tokens.float())
    with pytest.raises(sqft.UsageError, match="in place"):
        sqft.sparsify(model, calibration=tokens, out="x")
    with pytest.raises(sqft.UsageError, match="needs its tokenizer"):
        sqft.evaluate(model, EvaluateConfig(task="arithmetic"))
    with pytest.raises(sqft.SqftError, match="not sparse"):
        sqft.attach(model)
    sqft.sparsify(model, calibration=tokens)
    peft_model = sqft.attach(model)
    with pytest.raises(sqft.UsageError, match="tokenizer"):
        sqft.train(peft_model, TrainConfig(task="arithmetic"))
    with pytest.raises(sqft.SqftError, match="carries adapters"):
        sqft.sparsify(peft_model, calibration=tokens)
