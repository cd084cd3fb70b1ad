"""What must hold at every stage: zeros survive, merged equals un-merged, resume equals a straight run, seeds decide."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pico import FAMILIES, pico_folder, pico_model, pico_tokenizer
from safetensors.torch import load_file, save_file
from support.manifest import edit
from transformers import AutoModelForCausalLM

import sqft
from sqft import artifact
from sqft.adapters.peft_bridge import adapter_layers
from sqft.evaluation.scoring import unpacked
from sqft.models.discover import describe
from sqft.models.weights import Weight
from sqft.sparsity.masks import attach_masks, collect_masks, load_masks, mask_of
from sqft.training import loop


def pruned_positions_are_zero(folder: Path) -> int:
    """Asserts it for every mask of the folder, reading the files alone; returns how many there are."""
    weights, masks = load_file(folder / "model.safetensors"), load_masks(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    attach_masks(model, masks)
    count = 0
    for name in masks:
        dropped = ~mask_of(model.get_submodule(name))
        assert not weights[f"{name}.weight"][dropped].any(), name
        count += int(dropped.sum())
    return count


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_through_the_pipeline(family: str, tmp_path: Path, tokens, examples) -> None:
    pico_folder(tmp_path / "dense", family)
    sqft.sparsify(tmp_path / "dense", sqft.SparsifyConfig(batch_size=4), tokens, out=tmp_path / "sparse")
    config = sqft.TrainConfig(max_steps=4, batch_size=4, r=4, lora_alpha=8, learning_rate=0.02)
    sqft.train(tmp_path / "sparse", config, examples, out=tmp_path / "adapter")
    metrics = sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    pruned = pruned_positions_are_zero(tmp_path / "sparse")
    assert pruned == pruned_positions_are_zero(tmp_path / "merged") == metrics["pruned"] > 0
    assert metrics["zeros_kept"] == 1.0 and metrics["max_logit_difference"] < 1e-4
    # What is not adapted is not touched; what is adapted has changed.
    before, after = (load_file(tmp_path / stage / "model.safetensors") for stage in ("sparse", "merged"))
    adapted = {f"{name}.weight" for name in adapter_layers(sqft.load(tmp_path / "adapter")[0])}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == adapted and adapted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_merges_without_losing_a_zero(dtype: torch.dtype, tmp_path: Path, tokens, examples) -> None:
    """What training multiplied with is what is written, in the base's precision: logits are equal, not merely close."""
    pico_folder(tmp_path / "dense", dtype=dtype)
    sqft.sparsify(tmp_path / "dense", sqft.SparsifyConfig(), tokens, out=tmp_path / "sparse")
    config = sqft.TrainConfig(max_steps=4, batch_size=4, r=4, lora_alpha=8, learning_rate=0.02)
    sqft.train(tmp_path / "sparse", config, examples, out=tmp_path / "adapter")
    metrics = sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    assert metrics["zeros_kept"] == 1.0 and metrics["max_logit_difference"] == 0.0
    assert all(t.dtype == dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values())


def test_live_model_in_a_notebook(tokens, examples) -> None:
    model, tokenizer = pico_model(), pico_tokenizer()
    metrics = sqft.sparsify(model, sqft.SparsifyConfig(pattern="2:4"), tokens)
    assert metrics["sparsity"] == 0.5
    peft_model = sqft.attach(model, sqft.SqftConfig(r=4, lora_alpha=8))
    config = sqft.TrainConfig(max_steps=4, batch_size=4, learning_rate=0.02)
    assert sqft.train(peft_model, config, examples, tokenizer=tokenizer)["steps"] == 4
    merged = sqft.merge(peft_model)
    for linear in (weight.module for weight in describe(merged).weights()):
        assert not linear.weight[~mask_of(linear)].any()
        assert (linear.weight.view(-1, 4) != 0).sum(1).max() <= 2
    scores = sqft.evaluate(merged, sqft.EvaluateConfig(text="builtin", length=64, max_tokens=256), tokenizer=tokenizer)
    low, high = scores["perplexity_ci95"]
    assert low < scores["perplexity"] < high


def test_a_merged_model_can_be_tuned_and_merged_again(trained: Path, examples, tmp_path: Path) -> None:
    first = sqft.merge(trained, out=tmp_path / "first")
    config = sqft.TrainConfig(max_steps=3, batch_size=4, r=2, lora_alpha=4, learning_rate=0.02)
    sqft.train(tmp_path / "first", config, examples, out=tmp_path / "again")
    second = sqft.merge(tmp_path / "again", out=tmp_path / "second")
    assert second["zeros_kept"] == 1.0 and second["pruned"] == first["pruned"]


def test_a_kept_weight_that_is_zero_by_chance_may_grow(tokens) -> None:
    """The mask decides, not the value."""
    model = pico_model()
    sqft.sparsify(model, sqft.SparsifyConfig(), tokens)
    linear = model.get_submodule("model.layers.0.mlp.up_proj")
    row, column = map(int, mask_of(linear).nonzero()[0])
    linear.weight.data[row, column] = 0
    peft_model = sqft.attach(model, sqft.SqftConfig(r=4, lora_alpha=8))
    layer = adapter_layers(peft_model)["model.layers.0.mlp.up_proj"]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    merged = sqft.merge(peft_model)
    assert merged.get_submodule("model.layers.0.mlp.up_proj").weight[row, column] != 0


def test_a_foreign_sparse_model_brings_its_zeros(tmp_path: Path, examples) -> None:
    model = pico_model()
    for weight in describe(model).weights():
        weight.write(weight.read() * (torch.rand(weight.shape) < 0.4))
    expected = {weight.name: weight.read() != 0 for weight in describe(model).weights()}
    model.save_pretrained(tmp_path / "foreign")
    pico_tokenizer().save_pretrained(tmp_path / "foreign")
    config = sqft.TrainConfig(max_steps=3, batch_size=4, r=4, lora_alpha=8, learning_rate=0.02)
    sqft.train(tmp_path / "foreign", config, examples, out=tmp_path / "adapter")
    assert sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")["zeros_kept"] == 1.0
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    for name, mask in expected.items():
        assert not weights[f"{name}.weight"][~mask].any()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resumed_training_equals_a_straight_run(
    sparse: Path, examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    config = sqft.TrainConfig(max_steps=9, batch_size=4, r=4, lora_alpha=8, save_steps=3, lora_dropout=dropout,
                              learning_rate=0.02)  # fmt: skip
    sqft.train(sparse, config, examples, out=tmp_path / "straight")
    interrupted_after(7, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        sqft.train(sparse, config, examples, out=tmp_path / "resumed")
    monkeypatch.undo()
    assert not (tmp_path / "resumed").exists()
    resumed_from = []
    original = loop.last_checkpoint
    monkeypatch.setattr(loop, "last_checkpoint", lambda work: resumed_from.append(original(work)) or resumed_from[0])
    sqft.train(sparse, config, examples, out=tmp_path / "resumed")
    assert resumed_from[0].name == "checkpoint-6"
    straight, resumed = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("straight", "resumed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert not list(tmp_path.glob(".*"))


def interrupted_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the end of that training step."""
    original = loop.ProgressBar.on_step_end

    def interrupt(self, args, state, control, **kwargs) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.ProgressBar, "on_step_end", interrupt)


def test_same_seed_same_bytes(dense: Path, examples, tmp_path: Path) -> None:
    config = sqft.SparsifyConfig(samples=4, length=32)
    train = sqft.TrainConfig(max_steps=3, batch_size=4, r=4, lora_alpha=8)
    for run in ("a", "b"):
        sqft.sparsify(dense, config, out=tmp_path / run / "sparse")
        sqft.train(tmp_path / run / "sparse", train, examples, out=tmp_path / run / "adapter")
        sqft.merge(tmp_path / run / "adapter", out=tmp_path / run / "merged")
    for file in ("sparse/model.safetensors", "adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    keys = [json.loads((tmp_path / run / "merged" / "sqft.json").read_text())["key"] for run in ("a", "b")]
    assert keys[0] == keys[1]
    sqft.sparsify(dense, sqft.SparsifyConfig(samples=4, length=32, seed=1), out=tmp_path / "c")
    assert (tmp_path / "c" / "model.safetensors").read_bytes() != (tmp_path / "a/sparse/model.safetensors").read_bytes()


def test_streaming_from_a_folder_equals_pruning_in_memory(dense: Path, sparse: Path, tokens) -> None:
    model, _ = sqft.load(dense)
    sqft.sparsify(model, sqft.SparsifyConfig(), tokens)
    written, _ = sqft.load(sparse)
    for (name, live), (_, stored) in zip(model.state_dict().items(), written.state_dict().items(), strict=True):
        assert torch.equal(live, stored), name
    live_masks, stored_masks = collect_masks(model), collect_masks(written)
    assert live_masks.keys() == stored_masks.keys()
    assert all(torch.equal(live_masks[name], stored_masks[name]) for name in live_masks)


def test_merging_in_shards_gives_the_same_model(trained: Path, tmp_path: Path) -> None:
    sqft.merge(trained, out=tmp_path / "one")
    sqft.merge(trained, sqft.MergeConfig(max_shard_size="20KB"), out=tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), many.state_dict().values(), strict=True))


def test_a_merge_that_loses_a_zero_is_not_written(trained: Path, tmp_path: Path, monkeypatch) -> None:
    import sqft.merging.changes

    original = sqft.merging.changes.merged_weight
    monkeypatch.setattr(sqft.merging.changes, "merged_weight", lambda layer, name: original(layer, name) + 1e-6)
    with pytest.raises(sqft.VerificationError, match="not zero"):
        sqft.merge(trained, out=tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_merge_that_changes_the_logits_is_not_written(trained: Path, tmp_path: Path, monkeypatch) -> None:
    import sqft.merging.changes

    original = sqft.merging.changes.merged_weight
    monkeypatch.setattr(sqft.merging.changes, "merged_weight", lambda layer, name: original(layer, name) * 1.01)
    with pytest.raises(sqft.VerificationError, match="logits differ"):
        sqft.merge(trained, out=tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_plain_lora_is_refused_with_the_numbers_and_merges_on_demand(trained_lora: Path, tmp_path: Path) -> None:
    with pytest.raises(sqft.UsageError, match=r"50\.00% sparse and would be 0\.0"):
        sqft.merge(trained_lora, out=tmp_path / "merged")
    metrics = sqft.merge(trained_lora, sqft.MergeConfig(allow_dense=True), out=tmp_path / "merged")
    assert metrics["zeros_kept"] < 0.5
    assert not load_masks(tmp_path / "merged")


def test_what_was_pruned_once_stays_pruned(sparse: Path, tokens, tmp_path: Path) -> None:
    """Pruning a sparse model again, at a lower ratio or with exclusions, gives no pruned weight back."""
    config = sqft.SparsifyConfig(sparsity=0.25, exclude=["up_proj"])
    sqft.sparsify(sparse, config, tokens, out=tmp_path / "again")
    first, second = load_masks(sparse), load_masks(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name] & second[name], second[name]) for name in first)
    assert pruned_positions_are_zero(tmp_path / "again") >= pruned_positions_are_zero(sparse)


def test_masks_follow_the_model(tokens) -> None:
    model = pico_model()
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert "sqft_mask" not in linear.state_dict()
    assert torch.equal(mask_of(linear.half()), linear.weight != 0)
    Weight("", linear).set_mask(torch.ones(32, 32, dtype=torch.bool))
    assert mask_of(linear).all()


def test_merging_notices_that_the_adapter_is_not_the_trained_one(trained: Path, tmp_path: Path) -> None:
    """Merged equals loaded is not enough: loaded has to equal trained."""
    shutil.copytree(trained, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    save_file({**weights, name: -weights[name]}, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    parent = json.loads((tmp_path / "adapter" / "sqft.json").read_text())["parent"]
    edit(tmp_path / "adapter", parent=str(trained / parent))
    with pytest.raises(sqft.SqftError, match="adapter_model.safetensors was changed since it was written"):
        sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    artifact.accept(tmp_path / "adapter")
    with pytest.raises(sqft.VerificationError, match="does not compute what it did when it was trained"):
        sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (tmp_path / "adapter" / "probe.json").write_text("{")
    artifact.accept(tmp_path / "adapter")
    with pytest.raises(sqft.SqftError, match=r"probe\.json is corrupt"):
        sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")


def test_scoring_leaves_every_weight_as_it_was(trained: Path) -> None:
    """Masked adapters are merged while a model is scored; subtracting them again would round."""
    model, _ = sqft.load(trained)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.arange(40)[None]
    plain = model(input_ids=tokens).logits
    with unpacked(model):
        torch.testing.assert_close(model(input_ids=tokens).logits, plain, atol=1e-5, rtol=0)
        assert all(layer.merged for layer in adapter_layers(model).values())
    assert not any(layer.merged for layer in adapter_layers(model).values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
