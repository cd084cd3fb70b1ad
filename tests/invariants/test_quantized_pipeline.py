"""What must hold with a packed base: zeros survive, merged integers are the trained ones, formats do not matter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pico import FAMILIES, pico_folder, pico_model, pico_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import sqft
from sqft import artifact
from sqft.adapters.kinds import layer_kind
from sqft.adapters.peft_bridge import adapter_layers
from sqft.formats.checkpoint import packed_layers
from sqft.models.discover import describe
from sqft.sparsity.masks import attach_masks, collect_masks, load_masks, mask_of

QUANTIZE = sqft.QuantizeConfig(group_size=32, format="gptq_v2")
TRAIN = sqft.TrainConfig(adapter="qa-sparse-peft", max_steps=4, batch_size=4, r=4, lora_alpha=8, learning_rate=0.02)


def pruned_positions_are_zero(folder: Path) -> int:
    model, _ = sqft.load(folder)
    count = 0
    for layer in packed_layers(model).values():
        dropped = ~mask_of(layer)
        assert not layer.dequantize()[dropped].any()
        count += int(dropped.sum())
    return count


@pytest.fixture(scope="module")
def packed(sparse: Path, tokens, tmp_path_factory) -> Path:
    """The sparse pico Llama in INT4."""
    out = tmp_path_factory.mktemp("packed") / "model"
    sqft.quantize(sparse, QUANTIZE, tokens, out=out)
    return out


@pytest.fixture(scope="module")
def trained_packed(packed: Path, examples, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained_packed") / "adapter"
    sqft.train(packed, TRAIN, examples, out=out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_through_the_pipeline(family: str, tmp_path: Path, tokens, examples) -> None:
    pico_folder(tmp_path / "dense", family)
    sqft.sparsify(tmp_path / "dense", sqft.SparsifyConfig(batch_size=4), tokens, out=tmp_path / "sparse")
    quantized = sqft.quantize(tmp_path / "sparse", QUANTIZE, tokens, out=tmp_path / "packed")
    assert quantized["zeros_kept"] == 1.0 and quantized["filled"] == 0 < quantized["pruned"]
    sqft.train(tmp_path / "packed", TRAIN, examples, out=tmp_path / "adapter")
    metrics = sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    assert metrics["zeros_kept"] == 1.0 and metrics["bits"] == 4 and metrics["max_logit_difference"] < 1e-4
    assert pruned_positions_are_zero(tmp_path / "merged") == quantized["pruned"]
    # The grid is the base's; the adapted integers have changed, and nothing else.
    before, after = (load_file(tmp_path / stage / "model.safetensors") for stage in ("packed", "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= {f"{name}.qweight" for name in adapter_layers(sqft.load(tmp_path / "adapter")[0])}


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"bits": 2}, {"bits": 3, "symmetric": True, "exclude": ["k_proj", "v_proj"]}, {"bits": 8}, {"act_order": False}, {"symmetric": True, "clip": "mse"},
    {"method": "rtn"}, {"group_size": -1, "scale_bits": 7}, {"true_sequential": False}, {"format": "compressed-tensors"},
    {"exclude": ["o_proj", "model.layers.0.*"]},
], ids=str)  # fmt: skip
def test_every_option_goes_through_the_pipeline(options: dict, sparse: Path, tokens, examples, tmp_path: Path) -> None:
    config = sqft.QuantizeConfig(**{"group_size": 32, **options})
    quantized = sqft.quantize(sparse, config, tokens, out=tmp_path / "packed")
    assert quantized["zeros_kept"] == 1.0
    training = TRAIN
    if "exclude" in options:
        training = sqft.TrainConfig(**{**vars(TRAIN), "target_modules": ["model.layers.1.mlp.*"]})
    sqft.train(tmp_path / "packed", training, examples, out=tmp_path / "adapter")
    metrics = sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    assert metrics["zeros_kept"] == 1.0 and metrics["max_logit_difference"] < 1e-4 and metrics["integers_compared"] > 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]


def test_merging_twice_gives_the_same_bytes_and_another_round_of_tuning_works(
    trained_packed: Path, examples, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        sqft.merge(trained_packed, out=tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    sqft.train(tmp_path / "a", TRAIN, examples, out=tmp_path / "again")
    second = sqft.merge(tmp_path / "again", out=tmp_path / "second")
    assert second["zeros_kept"] == 1.0 and load_masks(tmp_path / "second").keys() == load_masks(tmp_path / "a").keys()


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_an_int_folder_are_the_sparse_models_and_small(
    bits: int, sparse: Path, tokens, examples, tmp_path: Path
) -> None:
    """An INT folder stores only where a kept weight is zero; all of a mask must come back from that."""
    sqft.quantize(sparse, sqft.QuantizeConfig(bits=bits, group_size=32), tokens, out=tmp_path / "packed")
    sqft.train(tmp_path / "packed", TRAIN, examples, out=tmp_path / "adapter")
    sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    expected = collect_masks(sqft.load(sparse)[0])
    for folder in (tmp_path / "packed", tmp_path / "merged"):
        model, _ = sqft.load(folder)
        found, stored = collect_masks(model), load_masks(folder)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        total = 0
        for name, layer in packed_layers(model).items():
            kept_zeros = int((mask_of(layer) & (layer.dequantize() == 0)).sum())
            total += kept_zeros
            if kept_zeros * 4 < expected[name].numel():
                assert stored[name].dtype == torch.int32 and stored[name].numel() == kept_zeros
            else:
                assert torch.equal(stored[name], expected[name])
        assert total > 0 if bits == 2 else all(tensor.dtype == torch.int32 for tensor in stored.values())


def test_masks_of_other_weights_are_noticed(packed: Path) -> None:
    name, stored = next(iter(load_masks(packed).items()))
    assert stored.dtype == torch.int32
    nonzero = int(sqft.load(packed)[0].get_submodule(name).dequantize().flatten().nonzero()[0])
    for wrong in (nonzero, 10**6, -1):
        with pytest.raises(sqft.SqftError, match="does not fit the model's zeros"):
            attach_masks(sqft.load(packed)[0], {name: torch.tensor([wrong], dtype=torch.int32)})


@pytest.mark.parametrize("methods", [("wanda", "gptq"), ("magnitude", "gptq"), ("wanda", "rtn"), ("sparsegpt", "gptq")])
def test_one_walk_equals_two_stages(dense: Path, methods: tuple[str, str], tokens, tmp_path: Path) -> None:
    first = sqft.SparsifyConfig(method=methods[0], samples=5, length=32, seed=3)
    then = sqft.QuantizeConfig(method=methods[1], group_size=32, samples=6, length=24, seed=4)
    sqft.sparsify(dense, first, out=tmp_path / "sparse")
    sqft.quantize(tmp_path / "sparse", then, out=tmp_path / "two")
    sqft.quantize(dense, then, first=first, out=tmp_path / "one")
    for file in ("model.safetensors", "masks/masks.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_streaming_from_a_folder_equals_quantizing_in_memory(
    sparse: Path, packed: Path, tokens, tmp_path: Path
) -> None:
    model, tokenizer = sqft.load(sparse)
    sqft.quantize(model, QUANTIZE, tokens)
    sqft.save(model, tokenizer, tmp_path / "live")
    for file in ("model.safetensors", "masks/masks.safetensors"):
        assert (tmp_path / "live" / file).read_bytes() == (packed / file).read_bytes()


@pytest.mark.parametrize("options", [{"symmetric": True}, {}, {"format": "compressed-tensors"}], ids=str)
def test_save_pretrained_of_a_live_packed_model_is_right_too(
    options: dict, sparse: Path, tokens, tmp_path: Path
) -> None:
    """Its config describes its own state dict, whatever format sqft.save writes."""
    model, tokenizer = sqft.load(sparse)
    sqft.quantize(model, sqft.QuantizeConfig(group_size=32, **options), tokens)
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    sqft.save(model, tokenizer, tmp_path / "ours")
    with torch.no_grad():
        expected = model(tokens).logits
        for name in ("theirs", "ours"):
            again, _ = sqft.load(tmp_path / name)
            assert torch.equal(again(tokens).logits, expected)
            assert all(a.symmetric == b.symmetric for a, b in zip(packed_layers(again).values(), packed_layers(model).values(),
                                                                   strict=True))  # fmt: skip


def test_live_model_in_a_notebook(tokens, examples) -> None:
    model, tokenizer = pico_model(), pico_tokenizer()
    sqft.sparsify(model, sqft.SparsifyConfig(pattern="2:4"), tokens)
    assert sqft.quantize(model, QUANTIZE, tokens)["zeros_kept"] == 1.0
    peft_model = sqft.attach(model, sqft.SqftConfig(r=4, lora_alpha=8, quantization_aware=True))
    assert sqft.train(peft_model, TRAIN, examples, tokenizer=tokenizer)["steps"] == 4
    with torch.no_grad():
        before = peft_model(tokens).logits
        merged = sqft.merge(peft_model)
        assert torch.equal(merged(tokens).logits, before)
    assert all(not layer.dequantize()[~mask_of(layer)].any() for layer in packed_layers(merged).values())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision(precision: str, dense: Path, tokens, examples, tmp_path: Path) -> None:
    sqft.sparsify(dense, sqft.SparsifyConfig(dtype=precision), tokens, out=tmp_path / "sparse")
    sqft.quantize(tmp_path / "sparse", QUANTIZE, tokens, out=tmp_path / "packed")
    sqft.train(tmp_path / "packed", TRAIN, examples, out=tmp_path / "adapter")
    metrics = sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    assert metrics["zeros_kept"] == 1.0 and metrics["max_logit_difference"] == 0.0


def test_the_un_quantized_weight_as_base(sparse: Path, packed: Path, tokens, examples, tmp_path: Path) -> None:
    config = sqft.TrainConfig(**{**vars(TRAIN), "base": str(sparse)})
    sqft.train(packed, config, examples, out=tmp_path / "adapter")
    metrics = sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    assert metrics["zeros_kept"] == 1.0 and metrics["max_logit_difference"] < 1e-4
    # With a fresh adapter (B = 0) it is the float weight rounded to the nearest point of the grid.
    model = sqft.attach(sqft.load(packed)[0], sqft.SqftConfig(quantization_aware=True, float_base=str(sparse)))
    floats = dict(sqft.load(sparse)[0].named_modules())
    for name, layer in adapter_layers(model).items():
        grid = layer.get_base_layer().grid()
        assert torch.equal(layer.effective_weight("default"), grid.dequantize(grid.integers(floats[name].weight)))
    sqft.sparsify(sparse, sqft.SparsifyConfig(sparsity=0.7), tokens, out=tmp_path / "other")
    adapter = tmp_path / "adapter" / "adapter_config.json"
    adapter.write_text(json.dumps({**json.loads(adapter.read_text()), "float_base": "../other"}))
    artifact.accept(tmp_path / "adapter")
    with pytest.raises(sqft.SqftError, match="has changed since"):
        sqft.load(tmp_path / "adapter")


def test_a_float_base_is_found_again_for_twenty_and_more_modules(tokens, examples, tmp_path: Path) -> None:
    """PEFT then saves shortened module names. What is loaded has to be what was trained."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**FAMILIES["llama"], "num_hidden_layers": 5})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    pico_tokenizer().save_pretrained(tmp_path / "dense")
    sqft.sparsify(tmp_path / "dense", sqft.SparsifyConfig(), tokens, out=tmp_path / "sparse")
    sqft.quantize(tmp_path / "sparse", QUANTIZE, tokens, out=tmp_path / "packed")
    model, tokenizer = sqft.load(tmp_path / "packed")
    peft_model = sqft.attach(model, sqft.SqftConfig(r=4, quantization_aware=True, float_base=str(tmp_path / "sparse")))
    assert len(adapter_layers(peft_model)) == 25
    sqft.train(peft_model, TRAIN, examples, tokenizer=tokenizer)
    sqft.save(peft_model, tokenizer, tmp_path / "adapter")
    assert len(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]) < 20
    with torch.no_grad():
        assert torch.equal(sqft.load(tmp_path / "adapter")[0](tokens).logits, peft_model(tokens).logits)


def test_learnt_scales_are_merged(packed: Path, examples, tmp_path: Path) -> None:
    config = sqft.TrainConfig(**{**vars(TRAIN), "learn_scales": True, "learning_rate": 1e-3})
    sqft.train(packed, config, examples, out=tmp_path / "adapter")
    metrics = sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    assert metrics["zeros_kept"] == 1.0 and metrics["max_logit_difference"] < 1e-4
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "merged"))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("scales"))


def test_plain_lora_on_a_packed_base_trains_and_does_not_merge(packed: Path, tokens, examples, tmp_path: Path) -> None:
    model, _ = sqft.load(packed)
    model.eval()
    with torch.no_grad():
        model(tokens)  # an evaluation before training must not cost the gradients
    lora = sqft.attach(model, sqft.SqftConfig(r=4, sparse_adapter=False))
    lora.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in lora.named_parameters() if "lora_B" in n)
    config = sqft.TrainConfig(**{**vars(TRAIN), "adapter": "sqft", "max_steps": 8})
    metrics = sqft.train(packed, config, examples, out=tmp_path / "adapter")
    log = [json.loads(line) for line in (tmp_path / "adapter" / "training_log.jsonl").read_text().splitlines()]
    assert metrics["steps"] == 8 and log
    scores = sqft.evaluate(tmp_path / "adapter", sqft.EvaluateConfig(text="builtin", length=64, max_tokens=256))
    assert scores["perplexity"] > 1
    with pytest.raises(sqft.UsageError, match="not on its grid"):
        sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")


def test_pipelines_and_bases_have_to_go_together(sparse: Path, packed: Path, examples, tmp_path: Path) -> None:
    for folder, pipeline, message in [(packed, "sparse-peft", "is an INT model"), (packed, "lora", "is an INT model"),
                                      (sparse, "qa-sparse-peft", "is a float model"), (sparse, "sqft", "float model")]:  # fmt: skip
        with pytest.raises(sqft.UsageError, match=message):
            sqft.train(folder, sqft.TrainConfig(adapter=pipeline, max_steps=1), examples, out=tmp_path / "out")
    with pytest.raises(sqft.SqftError, match="quantize the model first"):
        sqft.attach(sqft.load(sparse)[0], sqft.SqftConfig(quantization_aware=True))
    with pytest.raises(sqft.SqftError, match="qa-sparse-peft"):
        sqft.attach(sqft.load(packed)[0], sqft.SqftConfig())
    for call in (sqft.quantize, sqft.sparsify):
        with pytest.raises(sqft.SqftError, match="is quantized"):
            call(packed, out=tmp_path / "out")


def test_a_dense_packed_model_takes_unmasked_quantization_aware_adapters(
    dense: Path, tokens, examples, tmp_path
) -> None:
    sqft.quantize(dense, QUANTIZE, tokens, out=tmp_path / "packed")
    assert not load_masks(tmp_path / "packed")
    model, tokenizer = sqft.load(tmp_path / "packed")
    peft_model = sqft.attach(model, sqft.SqftConfig(r=4, sparse_adapter=False, quantization_aware=True))
    assert all(layer_kind(layer).quantization_aware for layer in adapter_layers(peft_model).values())
    sqft.train(peft_model, TRAIN, examples, tokenizer=tokenizer)
    merged = sqft.merge(peft_model)
    assert len(packed_layers(merged)) == len(describe(merged).names())


@pytest.mark.parametrize("kind", ["qa-sparse-peft", "scales"])
def test_a_dense_packed_folder_too(dense: Path, tokens, examples, tmp_path, kind: str) -> None:
    """Most people's case: no zeros, plain INT4, and the adapter merged into it."""
    sqft.quantize(dense, QUANTIZE, tokens, out=tmp_path / "packed")
    sqft.train(tmp_path / "packed", replace(TRAIN, adapter=kind), examples, out=tmp_path / "adapter")
    metrics = sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    assert metrics["bits"] == 4 and metrics["max_logit_difference"] < 1e-4
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "merged"))
    changed = {name.rpartition(".")[2] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"scales" if kind == "scales" else "qweight"}


def test_evaluation_holds_packed_weights_unpacked_and_gives_the_same(trained_packed: Path, packed: Path) -> None:
    for folder in (packed, trained_packed):
        model, tokenizer = sqft.load(folder)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        scores = [sqft.evaluate(model, sqft.EvaluateConfig(text="builtin", length=64, max_tokens=256, unpack=unpack),
                                tokenizer=tokenizer)["perplexity"] for unpack in (True, False)]  # fmt: skip
        assert scores[0] == scores[1]
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_evaluation_builds_one_weight_at_a_time_where_memory_does_not_suffice(
    trained_packed: Path, monkeypatch
) -> None:
    import sqft.evaluation.scoring as scoring

    config = sqft.EvaluateConfig(text="builtin", length=64, max_tokens=256)
    expected = sqft.evaluate(trained_packed, config)["perplexity"]
    monkeypatch.setattr(scoring, "memory_left", lambda: 1000)
    with pytest.warns(sqft.errors.Note, match="0.0 GB are left|each is built when it is used"):
        assert sqft.evaluate(trained_packed, config)["perplexity"] == expected


def test_a_merge_that_changes_an_integer_is_not_written(trained_packed: Path, tmp_path: Path, monkeypatch) -> None:
    import sqft.merging.stage

    original = sqft.merging.stage.save_packed

    def corrupt(model, tokenizer, folder, size, change) -> None:
        original(model, tokenizer, folder, size, change)
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{next(iter(packed_layers(model)))}.qweight"][0, 0] ^= 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(sqft.merging.stage, "save_packed", corrupt)
    with pytest.raises(sqft.VerificationError, match="not what was trained|not zero"):
        sqft.merge(trained_packed, out=tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_resumed_training_equals_a_straight_run(packed: Path, examples, tmp_path: Path, monkeypatch) -> None:
    from test_pipeline import interrupted_after

    config = sqft.TrainConfig(**{**vars(TRAIN), "max_steps": 6, "save_steps": 2, "lora_dropout": 0.2})
    sqft.train(packed, config, examples, out=tmp_path / "straight")
    interrupted_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        sqft.train(packed, config, examples, out=tmp_path / "resumed")
    monkeypatch.undo()
    sqft.train(packed, config, examples, out=tmp_path / "resumed")
    straight, resumed = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("straight", "resumed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
