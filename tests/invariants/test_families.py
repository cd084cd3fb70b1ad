"""Every model type goes through all stages, and the sparsity that is reported is counted over all of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pico import FAMILIES, MORE, pico_folder, pico_model
from support.families import go_through, tokens, zeros
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import sqft
from sqft import registry
from sqft.models import infer as module_of_infer
from sqft.models.discover import _describe_block, describe
from sqft.models.experts import unstack
from sqft.models.infer import infer
from sqft.models.tables import Family

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE)
def test_all_stages(family: str, tmp_path: Path, examples: list) -> None:
    """``go_through`` asserts at every stage; here, that it looked at all of the blocks."""
    found = go_through(family, tmp_path, tokens(), examples)
    assert len(found["weights"]) == len(describe(pico_model(family)).blocks) and min(found["weights"]) > 0
    assert abs(found["sparsity"] - 0.5) < 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_is_skipped(family: str) -> None:
    """Of those that other tests take through the stages."""
    model = pico_model(family)
    assert (
        sqft.sparsify(model, sqft.SparsifyConfig(pattern="2:4", method="magnitude"))["sparsity"] == zeros(model) == 0.5
    )


def test_every_model_type_has_a_model_in_the_tests_and_a_line_in_the_docs() -> None:
    assert set(registry.FAMILIES) == {*FAMILIES, *MORE}
    rows = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())["results"]["rows"]
    page = (ROOT / "docs" / "families.md").read_text()
    assert rows.keys() == {*FAMILIES, *MORE} and all(f"| {name} |" in page for name in rows)


def test_a_weight_that_the_table_does_not_list_is_refused() -> None:
    model = pico_model()
    model.model.layers[1].mlp.experts = torch.nn.Module()
    model.model.layers[1].mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(4, 32, 32))
    with pytest.raises(sqft.SqftError, match="also has mlp.experts.down_proj"):
        describe(model)
    hybrid = pico_model("lfm2")
    del hybrid.model.layers[0].conv.out_proj
    with pytest.raises(sqft.SqftError, match="lacks conv.out_proj"):
        describe(hybrid)


def test_what_peft_does_not_adapt_is_left_out_and_asking_for_it_is_an_error(examples: list) -> None:
    model = pico_model("mamba2")
    adapted = sqft.attach(model, sqft.SqftConfig(r=2, sparse_adapter=False, target_modules=["all"]))
    assert {name.rpartition(".")[2] for name, _ in adapted.named_modules() if name.endswith("_proj")} == {
        "in_proj",
        "out_proj",
    }
    assert not any("out_proj.lora" in name for name, _ in adapted.named_parameters())
    with pytest.raises(sqft.errors.UsageError, match="out_proj"):
        sqft.attach(pico_model("mamba2"), sqft.SqftConfig(r=2, sparse_adapter=False, target_modules=["out_proj"]))


EXPERTS = ("mixtral", "gpt_oss", "llama4_text", "deepseek_v3")


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_as_modules_compute_and_are_stored_as_before(family: str, tmp_path: Path) -> None:
    model, prompt = pico_model(family), torch.arange(24)[None]
    with torch.no_grad():
        logits, state = model(prompt).logits, {name: t.clone() for name, t in model.state_dict().items()}
        unstack(model)
        assert any(".experts.3.down_proj.weight" in name for name, _ in model.named_parameters())
        assert torch.allclose(model(prompt).logits, logits, atol=1e-6)
        after = model.state_dict()
        assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
        assert any("experts.down_proj" in name and after[name]._is_view() for name in after)  # no copy while untouched
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter)
        model.load_state_dict(state)
        assert torch.allclose(model(prompt).logits, logits, atol=1e-6)


def test_transformers_loads_what_is_written_of_experts(tmp_path: Path, examples: list) -> None:
    """And finds in its stacked parameters the zeros that the masks say, and the merged weights."""
    pico_folder(tmp_path / "dense", "qwen3_moe")
    sqft.sparsify(tmp_path / "dense", sqft.SparsifyConfig(method="magnitude"), out=tmp_path / "sparse")
    config = sqft.TrainConfig(max_steps=2, batch_size=4, r=2, learning_rate=0.02, target_modules=["*.experts.*_proj"])
    sqft.train(tmp_path / "sparse", config, examples, out=tmp_path / "adapter")
    sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    stock, ours = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(),
        sqft.load(tmp_path / "merged")[0].eval(),
    )
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    prompt = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.allclose(stock(prompt).logits, ours(prompt).logits, atol=1e-5)
    path = "model.layers.1.mlp.experts.gate_up_proj"
    one, other = (model.get_parameter(path) for model in (before, stock))
    assert one.shape == (4, 128, 64) and torch.equal(one == 0, other == 0) and not torch.equal(one, other)
    assert abs(float((one == 0).float().mean()) - 0.5) < 0.01


@pytest.mark.parametrize("sequential", [True, False])
def test_experts_that_no_token_reaches_are_pruned_and_rounded_and_counted(sequential: bool) -> None:
    few = torch.arange(6).view(2, 3)
    model = pico_model("mixtral", num_local_experts=16)
    told = sqft.sparsify(model, sqft.SparsifyConfig(pattern="2:4", batch_size=1), few)
    assert told["unreached"] > 0 and told["sparsity"] == zeros(model) == 0.5
    config = sqft.QuantizeConfig(group_size=32, batch_size=1, true_sequential=sequential)
    quantized = sqft.quantize(model, config, few)
    assert quantized["unreached"] > 0 and quantized["zeros_kept"] == 1.0
    assert all(weight.packed for weight in describe(model).weights())


def test_sequential_statistics_of_experts_are_those_of_all_batches() -> None:
    """The integers do not depend on how tokens are batched, although not every batch reaches every expert."""
    text, found = torch.randint(0, 256, (6, 5), generator=torch.Generator().manual_seed(1)), []
    for size in (1, 6):
        model = pico_model("deepseek_v3")
        sqft.quantize(model, sqft.QuantizeConfig(group_size=32, batch_size=size), text)
        found.append({weight.name: weight.module.integers() for weight in describe(model).weights()})
    differ = sum(int((found[0][name] != found[1][name]).sum()) for name in found[0])
    assert differ <= 0.002 * sum(q.numel() for q in found[0].values())


def test_what_is_not_supported_is_refused_by_a_sentence() -> None:
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16, "vocab_size": 60}
    encoder = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))
    with pytest.raises(sqft.SqftError, match="t5 is an encoder-decoder model"):
        sqft.sparsify(encoder, sqft.SparsifyConfig(method="magnitude"))
    other = pico_model()
    for name, message in (("rwkv", "'rwkv' is not supported yet: --infer"), ("lama", "did you mean 'llama'")):
        other.config.model_type = name
        with pytest.raises(sqft.SqftError, match=message):
            describe(other)


@pytest.mark.slow
@pytest.mark.parametrize("family, options", [
    ("gpt_neox_japanese", {"hidden_size": 64, "intermediate_multiple_size": 2, "num_hidden_layers": 2,
                           "num_attention_heads": 4, "vocab_size": 260, "max_position_embeddings": 512}),
    ("granitemoeshared", {**MORE["granitemoe"], "shared_intermediate_size": 64}),
], ids=["plain", "experts"])  # fmt: skip
def test_a_type_that_is_not_known_can_be_inferred_and_goes_through_all_stages(
    family: str, options: dict, tmp_path: Path, examples: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MORE, family, options)
    with pytest.raises(sqft.SqftError, match="not supported yet: --infer"):
        describe(pico_model(family))
    monkeypatch.setattr(module_of_infer, "_allowed", True)
    assert go_through(family, tmp_path, tokens(), examples)["row"] == "inferred"


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_inferring_finds_what_the_table_says(family: str) -> None:
    """But for what makes a state, which no name tells."""
    model = pico_model(family)
    known = set(describe(model).names())
    row = infer(model)
    found = set(_inferred(model, row))
    assert known <= found and all(name.endswith(("in_proj_ba", "x_proj", "dt_proj")) for name in found - known)


def _inferred(model: torch.nn.Module, row: Family) -> list[str]:
    blocks = model.get_submodule(row.blocks)
    return [
        weight for i, block in enumerate(blocks) for weight in _describe_block(row, f"{row.blocks}.{i}", block).weights
    ]
