"""The command lines that a report shows give the stages' options back."""

from __future__ import annotations

import json
import shlex

import pytest

from sqft import cli
from sqft.config import SHARED, EvaluateConfig, MergeConfig, QuantizeConfig, SearchConfig, SparsifyConfig, TrainConfig
from sqft.flags import inherit
from sqft.options import to_dict
from sqft.reporting.commands import command

CONFIGS = [
    ("sparsify", SparsifyConfig(sparsity=0.6, overrides={"*.down_proj": 0.4, "a b": 0.25}, exclude=["x*", "y"], samples=3)),
    ("sparsify", SparsifyConfig(pattern="2:4", calibration="it's a file.txt", dtype="bfloat16")),
    ("quantize", QuantizeConfig(group_size=-1, bits=3, symmetric=True, act_order=False, scale_bits=7, exclude=["-a", "b"])),
    ("train", TrainConfig(data="d.jsonl", prompt="Question: {q}\n$A `x` \"y\":", completion="", search_space=[32, 16],
                          rank_groups=["q_proj+k_proj", "up_proj=32/16"], learning_rate=1.5e-3, max_steps=5, eval_limit=None,
                          group_by_length=False, gradient_checkpointing=True, epochs=0.5)),
    ("train", TrainConfig(task="arithmetic", prompt="- {question}", adapter="qa-sparse-peft", base="a folder", learn_scales=True)),
    ("search", SearchConfig(task="arithmetic", pick="smallest-within 1%", limit=None, metric="loss", screen=3)),
    ("merge", MergeConfig(ranks="median", allow_dense=True, tolerance=1e-3)),
    ("evaluate", EvaluateConfig(text="builtin", max_tokens=5, unpack=False)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=lambda value: value if isinstance(value, str) else "")
def test_commands_parse_back_to_their_config(name: str, config: object) -> None:
    line = command(name, "in put", "out", json.loads(json.dumps(to_dict(config))))
    words = shlex.split(line)
    assert words[0] == "sqft" and "given from Python" not in line
    parsed = cli.build_parser().parse_args(words[1:])
    assert cli.read_flags(parsed, type(config)) == config
    assert parsed.out == "out" and "in put" in vars(parsed).values()


def test_commands_of_what_flags_cannot_say() -> None:
    first = SparsifyConfig(samples=2, data_dir="d", repair="layer", length=64)
    for second in (QuantizeConfig(bits=8), QuantizeConfig(samples=2, length=32, data_dir="d", dtype="float16")):
        both = {**to_dict(second), "first": to_dict(first)}
        head, then = cli._split_then(shlex.split(command("quantize", "m", "o", both))[1:])
        before = cli.build_parser().parse_args(head)
        assert cli.read_flags(before, SparsifyConfig) == first
        assert cli.read_flags(inherit(then, before, SHARED), QuantizeConfig) == second
    assert command("extract", "a", "o", {"choice": "knee"}) == "sqft extract a o --choice knee"
    tokens = command("sparsify", "m", "o", {**to_dict(SparsifyConfig()), "calibration": "tokens:ab"})
    assert tokens == "sqft sparsify m o  # given from Python: calibration"
    ranks = command("merge", "m", "o", {**to_dict(MergeConfig()), "ranks": {"a": 1}})
    assert ranks == "sqft merge m o  # given from Python: ranks"
    assert command("train", "m", "o", to_dict(TrainConfig())) == "sqft train m o  # given from Python: data"
    assert command("merge", "m", "o", {"new\n": 1}).startswith(
        "# o: its options are those of another version of sqft ("
    )
    assert command("save", "m", "o", {}) == command("merge", "", "o", {}) == "# o: written from Python"
