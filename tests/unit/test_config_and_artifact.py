"""Configs, the registry, stage folders, model discovery, the public API."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pico import FAMILIES, pico_model
from torch import nn

import sqft
from sqft import artifact
from sqft.compressing.sparsify import make_plan
from sqft.config import EvaluateConfig, MergeConfig, SparsifyConfig, TrainConfig, from_dict, parse_size, to_dict
from sqft.models.discover import describe, resolve_targets
from sqft.models.tensors import ModelWriter, layout
from sqft.registry import Registry

CONFIGS = (SparsifyConfig, TrainConfig, MergeConfig, EvaluateConfig)


def test_import_does_no_work() -> None:
    code = "import sys, sqft; dir(sqft); assert 'torch' not in sys.modules; import sqft.cli; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_exist() -> None:
    for name in sqft.__all__:
        assert getattr(sqft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        sqft.quantise  # noqa: B018


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
        (SparsifyConfig, {"sparsity": 0}, "between 0 and 1"),
        (SparsifyConfig, {"sparsity": True}, "is not of type float"),
        (SparsifyConfig, {"samples": 2.5}, "not a whole number"),
        (SparsifyConfig, {"overrides": {"q_proj": 2}}, "override 'q_proj' is 2"),
        (SparsifyConfig, {"pattern": "2:"}, "not N:M"),
        (TrainConfig, {"scheduler": "cosin"}, "did you mean 'cosine'"),
        (TrainConfig, {"lora_dropout": 1}, r"in \[0, 1\)"),
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
    assert registry["wanda"].__name__ == "wanda"
    with pytest.raises(sqft.UsageError, match="unknown method 'wand': did you mean 'wanda'"):
        registry["wand"]


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"

    def write(text: str, fail: bool = False) -> None:
        with artifact.writing(out, overwrite=True) as folder:
            (folder / "file").write_text(text)
            artifact.write_manifest(folder, artifact.Manifest("test"))
            if fail:
                raise RuntimeError

    write("one")
    with pytest.raises(RuntimeError):
        write("two", fail=True)
    assert (out / "file").read_text() == "one" and len(list(out.parent.iterdir())) == 1
    write("three")
    assert (out / "file").read_text() == "three" and len(list(out.parent.iterdir())) == 1
    manifest = artifact.check_files(out)
    assert manifest.files == {"file": 5} and manifest.versions["torch"] == torch.__version__
    (out / "file").unlink()
    with pytest.raises(sqft.SqftError, match="file is missing"):
        artifact.check_files(out)
    (out / "sqft.json").write_text('{"stage": "x", "format": 99}')
    with pytest.raises(sqft.SqftError, match="update sqft"):
        artifact.read_manifest(out)
    (out / "sqft.json").write_text("{")
    with pytest.raises(sqft.SqftError, match="corrupt"):
        artifact.read_manifest(out)


def test_stage_keys_follow_options_inputs_and_parents(tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("one")
    key = artifact.stage_key("train", {"data": str(data), "r": 4}, "parent")
    assert key == artifact.stage_key("train", {"r": 4, "data": str(data)}, "parent")
    others = [artifact.stage_key("train", {"data": str(data), "r": 8}, "parent"),
              artifact.stage_key("train", {"data": str(data), "r": 4}, "other"),
              artifact.stage_key("merge", {"data": str(data), "r": 4}, "parent")]  # fmt: skip
    data.write_text("two")
    others.append(artifact.stage_key("train", {"data": str(data), "r": 4}, "parent"))
    assert len({key, *others}) == 5


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
    plan = make_plan(architecture, config)
    assert plan["model.layers.1.mlp.down_proj"] == (0.25, None)
    assert plan["model.layers.1.mlp.up_proj"] == (0.5, (2, 4))
    assert not any(name.startswith("model.layers.0.") for name in plan)
    model = pico_model()
    metrics = sqft.sparsify(
        model, SparsifyConfig(method="magnitude", overrides={"down_proj": 0.25}, exclude=["o_proj"])
    )
    assert metrics["by_module"]["model.layers.0.mlp.down_proj"] == 0.25
    assert metrics["by_module"]["model.layers.1.self_attn.o_proj"] == 0
    assert metrics["by_module"]["model.layers.1.self_attn.q_proj"] == 0.5
    with pytest.raises(sqft.UsageError, match="every module is excluded"):
        make_plan(architecture, SparsifyConfig(exclude=["*"]))
    with pytest.raises(sqft.UsageError, match="prunes nothing"):
        make_plan(architecture, SparsifyConfig(sparsity=0.001))


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
