"""Quantization-aware training from GPTQ's fractions, in steps of the grid, of scales alone, and from another adapter."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pico import pico_model, pico_tokenizer
from safetensors.torch import load_file, save_file

import sqft
from sqft.adapters.peft_bridge import adapter_layers
from sqft.folders import write_files
from sqft.formats.checkpoint import packed_layers
from sqft.formats.fractions import attach_fractions, load_fractions
from sqft.keys import folder_key
from sqft.measuring.size import serving_bytes
from sqft.sparsity.masks import mask_of
from sqft.training.data import TrainingData
from sqft.training.loop import make_trainer

QUANTIZE = sqft.QuantizeConfig(group_size=32, keep_fractions=True, format="gptq_v2")
TRAIN = sqft.TrainConfig(adapter="qa-sparse-peft", max_steps=4, batch_size=4, r=4, lora_alpha=8, learning_rate=0.02)
FILE = Path("fractions/fractions.safetensors")


@pytest.fixture(scope="module")
def packed(sparse: Path, tokens, tmp_path_factory) -> Path:
    """The sparse pico Llama in INT4, with fractions."""
    out = tmp_path_factory.mktemp("packed") / "model"
    sqft.quantize(sparse, QUANTIZE, tokens, out=out)
    return out


def integers(model) -> dict[str, torch.Tensor]:
    return {name: layer.integers() for name, layer in packed_layers(model).items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_fractions_are_kept_beside_the_weights(method: str, sparse: Path, tokens, tmp_path: Path) -> None:
    config = replace(QUANTIZE, method=method)
    sqft.quantize(sparse, config, tokens, out=tmp_path / "with")
    sqft.quantize(sparse, replace(config, keep_fractions=False), tokens, out=tmp_path / "without")
    for file in ("model.safetensors", "config.json", "masks/masks.safetensors"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    assert not (tmp_path / "without" / FILE).exists()
    assert serving_bytes(tmp_path / "with") == serving_bytes(tmp_path / "without")
    model, tokenizer = sqft.load(tmp_path / "with")
    for layer in packed_layers(model).values():
        f_IO = layer.fractions
        assert f_IO is not None and f_IO.dtype == torch.int8 and f_IO.int().abs().max() <= 127
        assert not f_IO.mT[~mask_of(layer)].any() and f_IO.unique().numel() > 100
    assert not any("fractions" in name for name in model.state_dict())
    sqft.save(model, tokenizer, tmp_path / "saved")
    live, _ = sqft.load(sparse)
    sqft.quantize(live, config, tokens)
    assert same(load_fractions(tmp_path / "with"), load_fractions(tmp_path / "saved"))
    for name, layer in packed_layers(live).items():
        assert torch.equal(layer.fractions, load_fractions(tmp_path / "with")[name])
    assert next(iter(packed_layers(live.to("meta")).values())).fractions.device.type == "meta"
    # A folder that no stage wrote is known by them too.
    (tmp_path / "plain").mkdir()
    write_files(model, tokenizer, tmp_path / "plain")
    key = folder_key(tmp_path / "plain")
    (tmp_path / "plain" / FILE).unlink()
    assert folder_key(tmp_path / "plain") != key


def test_fractions_of_another_model_are_refused(packed: Path, tmp_path: Path) -> None:
    model, _ = sqft.load(packed)
    name, f_IO = next(iter(load_fractions(packed).items()))
    for wrong in ({"model.nowhere": f_IO}, {name: f_IO[:-1]}, {name: f_IO.int()}):
        with pytest.raises(sqft.SqftError, match="do not fit"):
            attach_fractions(model, wrong)
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_bytes((packed / FILE).read_bytes()[:100])
    with pytest.raises(sqft.SqftError, match="corrupt or truncated"):
        load_fractions(tmp_path)


@pytest.mark.parametrize("options", [{}, {"units": "step"}, {"learn_scales": True}, {"search_space": [4, 2]}], ids=str)
def test_step_0_is_the_int_base_bit_for_bit(options: dict, packed: Path, tokens) -> None:
    model, _ = sqft.load(packed)
    before = integers(model)
    with torch.no_grad():
        expected = model(tokens).logits
        adapter = sqft.attach(model, sqft.SqftConfig(r=4, quantization_aware=True, **options))
        assert adapter.peft_config["default"].fractions is True
        assert torch.equal(adapter.eval()(tokens).logits, expected)
        for name, layer in adapter_layers(adapter).items():
            assert layer._adapter("default").fractions is not None
            assert torch.equal(
                layer.merged_packed("default").qweight, packed_layers(model)[f"{name}.base_layer"].qweight
            )
        merged = sqft.merge(adapter)
        assert torch.equal(merged(tokens).logits, expected) and same(integers(merged), before)
    assert all(merged.get_submodule(name).fractions is None for name in adapter_layers(adapter))


@pytest.mark.parametrize("units", ["weight", "step"])
def test_what_is_trained_from_fractions_is_merged(units: str, packed: Path, examples, tokens, tmp_path: Path) -> None:
    rate = 0.2 if units == "step" else 0.02
    sqft.train(packed, replace(TRAIN, units=units, learning_rate=rate), examples, out=tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fractions"] is True and config["units"] == units
    metrics = sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    assert metrics["zeros_kept"] == 1.0 and metrics["max_logit_difference"] == 0.0
    assert not (tmp_path / "merged" / "fractions").exists()
    adapter, _ = sqft.load(tmp_path / "adapter")
    merged, _ = sqft.load(tmp_path / "merged")
    assert not same(integers(merged), integers(sqft.load(packed)[0]))
    # PEFT's own merge drops the fractions with the integers that they are of; un-merging brings both back.
    layer = next(iter(adapter_layers(adapter).values()))
    kept = layer.get_base_layer().fractions
    with torch.no_grad():
        adapter.merge_adapter()
        assert layer.get_base_layer().fractions is None
        assert torch.equal(adapter(tokens).logits, merged(tokens).logits)
        adapter.unmerge_adapter()
    assert layer.get_base_layer().fractions is kept


def test_an_adapter_knows_whether_it_starts_from_fractions(sparse: Path, packed: Path, tokens, tmp_path: Path) -> None:
    model, tokenizer = sqft.load(packed)
    bare = copy.deepcopy(model)
    for layer in packed_layers(bare).values():
        layer.fractions = None
    torch.manual_seed(0)
    adapters = {}
    for name, base, options in [("with", model, {}), ("refused", model, {"fractions": False}), ("without", bare, {}),
                                ("float", model, {"float_base": str(sparse)})]:  # fmt: skip
        config = sqft.SqftConfig(r=4, quantization_aware=True, init_lora_weights=False, **options)
        torch.manual_seed(0)
        adapter = sqft.attach(copy.deepcopy(base), config).eval()
        sqft.save(adapter, tokenizer, tmp_path / name, parent=packed)  # on a base with fractions
        with torch.no_grad():
            adapters[name] = adapter(tokens).logits
            assert torch.equal(sqft.load(tmp_path / name)[0](tokens).logits, adapters[name]), name
    assert torch.equal(adapters["refused"], adapters["without"])
    assert not torch.equal(adapters["with"], adapters["without"])
    with pytest.raises(sqft.SqftError, match="which has none"):
        sqft.attach(bare, sqft.SqftConfig(quantization_aware=True, fractions=True))
    for wrong in ({"units": "step"}, {"fractions": True}):
        with pytest.raises(sqft.UsageError, match="quantization_aware=True only"):
            sqft.SqftConfig(**wrong)
    with pytest.raises(sqft.UsageError, match="weight or step"):
        sqft.SqftConfig(quantization_aware=True, units="inch")


def test_scales_have_a_learning_rate_of_their_own(packed: Path, examples, tmp_path: Path) -> None:
    config = replace(TRAIN, learn_scales=True, weight_decay=0.1)
    for given, expected in ((None, 0.002), (1e-5, 1e-5)):
        model, tokenizer = sqft.load(packed)
        adapter = sqft.attach(model, sqft.SqftConfig(r=4, quantization_aware=True, learn_scales=True))
        trainer = make_trainer(adapter, tokenizer, replace(config, scale_learning_rate=given),
                               TrainingData(examples, (), {}), tmp_path)  # fmt: skip
        trainer.train()
        groups = trainer.optimizer.param_groups
        rates = {id(p): (group["initial_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        for name, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                assert rates.pop(id(parameter)) == ((expected, 0.0) if "scales" in name else (0.02, 0.1)), name
        assert not rates
    with pytest.raises(sqft.UsageError, match="goes with learn_scales"):
        sqft.TrainConfig(scale_learning_rate=1e-3)


@pytest.mark.parametrize("options", [
    {"learn_scales": True}, {"learn_scales": True, "units": "step"}, {"adapter": "scales"},
], ids=str)  # fmt: skip
def test_a_huge_learning_rate_of_scales_ends_finite_and_merges(
    options: dict, packed: Path, examples, tmp_path: Path
) -> None:
    config = replace(TRAIN, scale_learning_rate=1.0, **options)
    metrics = sqft.train(packed, config, examples, out=tmp_path / "adapter")
    assert torch.isfinite(torch.tensor(metrics["loss"]))
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert min(tensor.min() for name, tensor in state.items() if "scales" in name) < 0
    assert sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")["zeros_kept"] == 1.0
    for layer in packed_layers(sqft.load(tmp_path / "merged")[0]).values():
        assert torch.isfinite(layer.scales).all() and (layer.scales > 0).all()


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_scales_alone(sparsity: float | None, dense: Path, sparse: Path, tokens, examples, tmp_path: Path) -> None:
    """The integers stay, of every packed layer, and so do the zeros; the model need not be sparse."""
    source = sparse if sparsity else dense
    sqft.quantize(source, replace(QUANTIZE, exclude=["k_proj"]), tokens, out=tmp_path / "packed")
    config = replace(TRAIN, adapter="scales", learning_rate=1e-3)
    metrics = sqft.train(tmp_path / "packed", config, examples, out=tmp_path / "adapter")
    assert metrics["trainable_parameters"] == sum(
        layer.scales.numel() for layer in packed_layers(sqft.load(tmp_path / "packed")[0]).values()
    )
    metrics = sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    assert metrics["zeros_kept"] == 1.0 and metrics["max_logit_difference"] == 0.0
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("packed", "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(".scales")}
    # A merged adapter's model is polished in the same way.
    if sparsity:
        sqft.train(tmp_path / "merged", config, examples, out=tmp_path / "again")
        assert sqft.merge(tmp_path / "again", out=tmp_path / "polished")["zeros_kept"] == 1.0


def test_scales_alone_is_refused_elsewhere(sparse: Path, packed: Path, examples, tmp_path: Path) -> None:
    with pytest.raises(sqft.UsageError, match="is a float model"):
        sqft.train(sparse, replace(TRAIN, adapter="scales"), examples, out=tmp_path / "out")
    for wrong in ({"base": str(sparse)}, {"start_from": str(packed)}, {"search_space": [4, 2]}):
        with pytest.raises(sqft.UsageError, match="trains no factors"):
            replace(TRAIN, adapter="scales", **wrong)
    with pytest.raises(sqft.UsageError, match="trains no factors"):
        sqft.SqftConfig(kind="scales", search_space=[4])
    with pytest.raises(sqft.SqftError, match="of kind scales are for INT weights"):
        sqft.attach(sqft.load(sparse)[0], sqft.SqftConfig(kind="scales", target_modules=["q_proj"]))


def test_training_starts_from_a_float_adapter(
    sparse: Path, packed: Path, trained: Path, examples, tokens, tmp_path: Path
) -> None:
    """Of the same rank and modules; its step 0 is the float model rounded on the grid."""
    config = replace(TRAIN, start_from=str(trained), learning_rate=1e-12, base=str(sparse), max_steps=1)
    sqft.train(packed, config, examples, out=tmp_path / "adapter")
    adapter, float_model = sqft.load(tmp_path / "adapter")[0], sqft.load(trained)[0]
    floats = adapter_layers(float_model)
    for name, layer in adapter_layers(adapter).items():
        grid = layer.get_base_layer().grid()
        expected = grid.dequantize(grid.integers(floats[name].merged_weight("default")))
        assert float((layer.effective_weight("default") == expected).float().mean()) > 0.999  # ties but for rounding
    sqft.train(packed, replace(TRAIN, start_from=str(trained), learn_scales=True), examples, out=tmp_path / "scales")
    assert sqft.merge(tmp_path / "scales", out=tmp_path / "merged")["zeros_kept"] == 1.0
    # An adapter's learnt scales are taken over; and a float one starts from a float one.
    state = load_file(tmp_path / "scales" / "adapter_model.safetensors")
    again = replace(config, base=None, start_from=str(tmp_path / "scales"), learn_scales=True)
    sqft.train(packed, again, examples, out=tmp_path / "again")
    found = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.allclose(found[key], state[key], atol=1e-6) for key in state) and "scales" in "".join(state)
    tuned = replace(TRAIN, adapter="sparse-peft", start_from=str(trained), learning_rate=1e-12, max_steps=1)
    sqft.train(sparse, tuned, examples, out=tmp_path / "float")
    with torch.no_grad():
        expected = float_model(tokens).logits
        torch.testing.assert_close(sqft.load(tmp_path / "float")[0](tokens).logits, expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_that_does_not_fit_is_no_start(
    sparse: Path, packed: Path, trained: Path, examples, tmp_path: Path
) -> None:
    for wrong, message in [({"r": 8}, "has r 4 and this adapter 8"), ({"lora_alpha": 4}, "lora_alpha 8"),
                           ({"target_modules": ["q_proj"]}, r"trains model\.layers\.0.* and \d+ more"),
                           ({"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "o_proj"]},
                            r"lacks .*o_proj"),
                           ({"start_from": str(packed)}, "is not an adapter folder")]:  # fmt: skip
        config = replace(TRAIN, **{"start_from": str(trained), **wrong})
        with pytest.raises(sqft.UsageError, match=message):
            sqft.train(packed, config, examples, out=tmp_path / "out")
    with pytest.raises(sqft.UsageError, match="counts in weights"):
        replace(TRAIN, start_from=str(trained), units="step")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((trained / "adapter_config.json").read_bytes())
    state = load_file(trained / "adapter_model.safetensors")
    save_file(
        {key: tensor[..., :-1].contiguous() for key, tensor in state.items()}, broken / "adapter_model.safetensors"
    )
    with pytest.raises(sqft.UsageError, match="is of another model"):
        sqft.train(packed, replace(TRAIN, start_from=str(broken)), examples, out=tmp_path / "out")


def test_fractions_of_a_live_model_in_half_precision(tokens, examples) -> None:
    model, tokenizer = pico_model(dtype=torch.bfloat16), pico_tokenizer()
    sqft.sparsify(model, sqft.SparsifyConfig(), tokens)
    sqft.quantize(model, QUANTIZE, tokens)
    adapter = sqft.attach(model, sqft.SqftConfig(r=4, quantization_aware=True, units="step", learn_scales=True))
    sqft.train(adapter, replace(TRAIN, precision="bfloat16", learning_rate=0.2), examples, tokenizer=tokenizer)
    with torch.no_grad():
        before = adapter(tokens).logits
        assert torch.equal(sqft.merge(adapter)(tokens).logits, before)
