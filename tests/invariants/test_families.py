"""Every model type goes through all stages, and the sparsity that is reported is counted over all of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pico import FAMILIES, MORE, here, pico_folder, pico_model
from support.families import check_untouched, go_through, tokens, zeros
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

import sqft
from sqft import registry
from sqft.calibration.walker import walk
from sqft.models import infer as module_of_infer
from sqft.models.discover import Block, _describe_block, describe
from sqft.models.experts import unstack
from sqft.models.infer import infer
from sqft.models.tables import Family

ROOT = Path(__file__).resolve().parents[2]


def params(*families: str) -> list:
    return [
        pytest.param(name, marks=pytest.mark.skipif(not here(name), reason=f"{name} needs timm")) for name in families
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", params(*MORE))
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


EXPERTS = ("mixtral", "gpt_oss", "llama4_text", "deepseek_v3", "nemotron_h", "gemma4_text")


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


@pytest.mark.parametrize("family, path, shape", [
    ("qwen3_moe", "model.layers.1.mlp.experts.gate_up_proj", (4, 128, 64)),
    ("nemotron_h", "model.layers.3.mixer.experts.up_proj", (4, 64, 64)),
])  # fmt: skip
def test_transformers_loads_what_is_written_of_experts(
    family: str, path: str, shape: tuple, tmp_path: Path, examples: list
) -> None:
    """And finds in its stacked parameters the zeros that the masks say, and the merged weights."""
    pico_folder(tmp_path / "dense", family)
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
    one, other = (model.get_parameter(path) for model in (before, stock))
    assert one.shape == shape and torch.equal(one == 0, other == 0) and not torch.equal(one, other)
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


@pytest.mark.parametrize("family", params(*FAMILIES, *MORE))
def test_inferring_finds_what_the_table_says(family: str) -> None:
    """But for what makes a state or mixes streams, and blocks that text does not run, which no name tells."""
    model = pico_model(family)
    known, whole = set(describe(model).names()), describe(model).whole
    row = infer(model)
    found = {name for name in _inferred(model, row) if not name.startswith(whole)}
    untold = ("in_proj_ba", "x_proj", "dt_proj", "modality_router", "_coefs", "linear_left", "linear_right")
    assert known <= found and all(name.endswith(untold) for name in found - known)


class Inputs:
    """A statistic that keeps what it is given."""

    def __init__(self, name: str = "") -> None:
        self.seen: list[torch.Tensor] = []

    def update(self, x: torch.Tensor) -> None:
        self.seen.append(x.clone())


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", "mllama", "nemotron_h"])
def test_the_walk_gives_every_layer_the_input_that_it_has_in_the_changed_model(family: str) -> None:
    """Where blocks take keys and values of earlier ones, or are passed over, too."""
    model = pico_model(family)
    architecture, found = describe(model), {}

    def change(block: Block, statistics: dict) -> None:
        for name, statistic in statistics.items():
            found[name] = torch.cat(statistic.seen)
            block.weights[name].write(block.weights[name].read() * 1.3)

    blocks = walk(architecture, tokens(), 2, Inputs, change, "", torch.device("cpu"), sequential=True)
    assert len(list(blocks)) == len(architecture.blocks)
    expected = {weight.name: Inputs() for weight in architecture.weights()}
    for weight in architecture.weights():
        weight.module.register_forward_pre_hook(lambda _, x, to=expected[weight.name]: to.update(x[0]))
    for batch in tokens().split(2):
        model(batch)
    assert found.keys() == {name for name, inputs in expected.items() if inputs.seen}
    for name, x in found.items():
        torch.testing.assert_close(x, torch.cat(expected[name].seen), rtol=1e-4, atol=1e-5)


def test_blocks_that_attend_to_an_image_stay_and_see_it(tmp_path: Path, examples: list) -> None:
    """They, the vision tower and the projector are what they were; the merged model sees as transformers' does."""
    pico_folder(tmp_path / "dense", "mllama")
    sqft.sparsify(tmp_path / "dense", sqft.SparsifyConfig(pattern="2:4"), tokens(), out=tmp_path / "sparse")
    config = sqft.TrainConfig(max_steps=2, batch_size=4, r=2, learning_rate=0.02, target_modules=["all"])
    sqft.train(tmp_path / "sparse", config, examples, out=tmp_path / "adapter")
    sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    merged, dense = sqft.load(tmp_path / "merged")[0].eval(), sqft.load(tmp_path / "dense")[0]
    check_untouched(dense, merged)
    whole = describe(merged).whole
    assert whole == ("model.language_model.layers.1",) and not any(
        name.startswith(whole) for name in describe(merged).names()
    )
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    torch.manual_seed(0)
    image = {"pixel_values": torch.randn(1, 1, 4, 3, 28, 28), "aspect_ratio_ids": torch.tensor([[1]]),
             "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
             "cross_attention_mask": torch.tensor([1, 0, 0, 0]).expand(1, 24, 1, 4)}  # fmt: skip
    prompt = torch.arange(10, 34)[None]
    with torch.no_grad():
        seen, blind = merged(prompt, **image).logits, merged(prompt).logits
        assert torch.equal(seen, stock(prompt, **image).logits) and not torch.allclose(seen, blind, atol=1e-3)


@pytest.mark.parametrize("method", ["gptaq", "repair"])
def test_experts_are_not_paired_with_the_unchanged_model(method: str) -> None:
    """Its tokens go to other experts: refused before any work."""
    options = {"method": "gptaq"} if method == "gptaq" else {"repair": "layer"}
    with pytest.raises(sqft.errors.UsageError, match="has experts"):
        sqft.quantize(pico_model("mixtral"), sqft.QuantizeConfig(group_size=32, **options), tokens())


def _inferred(model: torch.nn.Module, row: Family) -> list[str]:
    blocks = model.get_submodule(row.blocks)
    return [
        weight for i, block in enumerate(blocks) for weight in _describe_block(row, f"{row.blocks}.{i}", block).weights
    ]
