"""Checkpoint tensors to and from ``QuantLinear``: nothing is lost, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_model, pico_tokenizer
from torch import Tensor

import sqft
from sqft.errors import SqftError
from sqft.formats import compressed_tensors, gptq
from sqft.formats.checkpoint import mark_packed
from sqft.formats.settings import Format, Settings
from sqft.kernels.packed import unpack_words
from sqft.models.reader import SafetensorsReader
from sqft.quantization.grid import Grid
from sqft.quantization.linear import QuantLinear
from sqft.quantization.method import Quantized
from sqft.registry import FORMATS

BITS = (2, 3, 4, 8)
CODERS = [(gptq, "gptq"), (gptq, "gptq_v2"), (compressed_tensors, compressed_tensors.VERSION)]


def random_layer(bits: int, size: int = 32, *, symmetric: bool = False, outputs: int = 24, inputs: int = 96,
                 scrambled: bool = False, bias: bool = False, seed: int = 0) -> QuantLinear:  # fmt: skip
    """Random integers, scales and zero points; 0 and the largest zero point are among those of a row, side by side."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if size == -1 else inputs // size
    q_OI = torch.randint(0, 2**bits, (outputs, inputs), generator=generator).to(torch.uint8)
    zero_OG = torch.full((outputs, groups), 2 ** (bits - 1))
    if not symmetric:
        zero_OG = torch.randint(0, 2**bits, (outputs, groups), generator=generator)
        zero_OG[0::3], zero_OG[1::3] = 0, 2**bits - 1
        zero_OG[-2:] = 0  # the last field of the last word borrows from nothing
    scale_OG = torch.rand(outputs, groups, generator=generator).add(0.01).half()
    group_I = torch.arange(inputs) // (inputs // groups)
    group_I = group_I[torch.randperm(inputs, generator=generator)] if scrambled else None
    grid = Grid(bits, scale_OG, zero_OG.to(torch.uint8), group_I)
    values = torch.randn(outputs, generator=generator) if bias else None
    return QuantLinear.from_quantized(Quantized(q_OI, grid), size, symmetric, values)


def settings_of(layer: QuantLinear, coder: Any, version: str) -> Settings:
    return coder.read_config(coder.make_config({"layer": layer}, [], version))


def same(a: QuantLinear, b: QuantLinear) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("coder, version", CODERS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [
    {}, {"symmetric": True}, {"size": -1}, {"size": -1, "symmetric": True, "bias": True}, {"scrambled": True, "bias": True},
])  # fmt: skip
def test_what_is_written_reads_back_the_same(coder: Any, version: str, bits: int, kind: dict) -> None:
    layer = random_layer(bits, **kind)
    tensors = coder.encode(layer, version)
    back = coder.decode("layer", tensors, settings_of(layer, coder, version))
    assert same(layer, back)
    assert (back.symmetric, back.stored_group_size) == (layer.symmetric, layer.stored_group_size)
    assert torch.equal(back.dequantize(), layer.dequantize())
    again = coder.encode(back, version)
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("coder, version", CODERS)
@pytest.mark.parametrize("bits", BITS)
def test_rows_and_columns_that_do_not_fill_words(coder: Any, version: str, bits: int) -> None:
    layer = random_layer(bits, -1, outputs=13, inputs=39)
    assert same(layer, coder.decode("layer", coder.encode(layer, version), settings_of(layer, coder, version)))


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_version_1_subtracts_from_whole_words(bits: int) -> None:
    layer = random_layer(bits)
    stored = gptq.encode(layer, "gptq")["qzeros"]
    ones = sum(1 << shift for shift in range(0, 32, bits))
    for word, original in zip(stored.flatten().tolist(), layer.qzeros.flatten().tolist(), strict=True):
        assert (word - original + ones) % 2**32 == 0
    assert gptq.encode(layer, "gptq_v2")["qzeros"].equal(layer.qzeros)


def test_version_1_shifts_each_field_at_3_bits() -> None:
    layer = random_layer(3)
    stored = unpack_words(gptq.encode(layer, "gptq")["qzeros"].mT, layer.out_features, 3).mT
    assert torch.equal((stored + 1) % 8, layer.packed().zeros_GO())


def test_a_checkpoint_written_by_hand() -> None:
    """4 bits, one group, 8 x 8: row o is all o, zero points 8 (7 in version 1), scales 1/2."""
    word = sum(7 << shift for shift in range(0, 32, 4))
    tensors = {"qweight": torch.tensor([[0x11111111 * o - (2**32 if o > 7 else 0) for o in range(8)]], dtype=torch.int32),
               "qzeros": torch.tensor([[word]], dtype=torch.int32), "scales": torch.full((1, 8), 0.5).half()}  # fmt: skip
    layer = gptq.decode("layer", tensors, Settings(4, -1, True, "gptq"))
    assert torch.equal(layer.dequantize(), (torch.arange(8.0)[:, None] - 8).mul(0.5).expand(8, 8))
    rows = {"weight_packed": tensors["qweight"].mT.contiguous(), "weight_shape": torch.tensor([8, 8]),
            "weight_scale": torch.full((8, 1), 0.5)}  # fmt: skip
    other = compressed_tensors.decode("layer", rows, Settings(4, -1, True, compressed_tensors.VERSION))
    assert torch.equal(other.dequantize(), layer.dequantize()) and other.scales.dtype == torch.float16


def test_float32_scales_that_float16_cannot_hold_stay() -> None:
    layer = random_layer(4)
    tensors = compressed_tensors.encode(layer)
    tensors["weight_scale"] = tensors["weight_scale"].float() * 1.0001
    back = compressed_tensors.decode("layer", tensors, settings_of(layer, compressed_tensors, "pack-quantized"))
    assert torch.equal(back.scales.mT, tensors["weight_scale"])


def _cut(name: str) -> Any:
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


def _flat(name: str) -> Any:
    return lambda tensors: tensors.update({name: tensors[name].flatten()})


def _drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def _float(name: str) -> Any:
    return lambda tensors: tensors.update({name: tensors[name].float()})


def _set(name: str, value: int) -> Any:
    return lambda tensors: tensors.update({name: torch.full_like(tensors[name], value)})


@pytest.mark.parametrize("coder, version, names", [
    (gptq, "gptq", ("qweight", "qzeros", "scales")), (gptq, "gptq_v2", ("qweight", "qzeros", "scales")),
    (compressed_tensors, "pack-quantized", ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")),
])  # fmt: skip
def test_corrupt_tensors_are_refused_by_name(coder: Any, version: str, names: tuple[str, ...]) -> None:
    layer = random_layer(4)
    settings = settings_of(layer, coder, version)
    for name in names:
        damages = [_cut(name), _drop(name)]
        if name != "weight_shape":
            damages.append(_flat(name))
        if "scale" not in name:
            damages.append(_float(name))
        for damage in damages:
            tensors: dict[str, Tensor] = dict(coder.encode(layer, version))
            damage(tensors)
            with pytest.raises(SqftError, match=r"block\.7"):
                coder.decode("block.7", tensors, settings)


@pytest.mark.parametrize("coder, version, name", [
    (gptq, "gptq_v2", "g_idx"), (compressed_tensors, "pack-quantized", "weight_g_idx"),
])  # fmt: skip
@pytest.mark.parametrize("value", [-1, 3, 2**31 - 1])
def test_columns_of_groups_that_do_not_exist_are_refused(coder: Any, version: str, name: str, value: int) -> None:
    layer = random_layer(4, scrambled=True)
    tensors = dict(coder.encode(layer, version))
    _set(name, value)(tensors)
    with pytest.raises(SqftError, match=name):
        coder.decode("block.7", tensors, settings_of(layer, coder, version))


@pytest.mark.parametrize("coder, version", CODERS)
def test_bits_or_groups_of_another_model_are_refused(coder: Any, version: str) -> None:
    tensors = coder.encode(random_layer(4), version)
    for settings in (Settings(2, 32, False, version), Settings(8, 32, False, version), Settings(4, 48, False, version),
                     Settings(4, 64, False, version), Settings(4, 0, False, version)):  # fmt: skip
        with pytest.raises(SqftError, match=r"block\.7"):
            coder.decode("block.7", tensors, settings)


def _scheme(**weights: Any) -> dict[str, Any]:
    config = compressed_tensors.make_config({"layer": random_layer(4)}, [], "pack-quantized")
    config["config_groups"]["group_0"]["weights"].update(weights)
    return config


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}


@pytest.mark.parametrize("coder, config, message", [
    (gptq, {**_GPTQ, "bits": 5}, "5 bits"),
    (gptq, {**_GPTQ, "checkpoint_format": "marlin"}, "marlin"),
    (gptq, {**_GPTQ, "dynamic": {"+:.*down_proj": {"bits": 8}}}, "dynamic"),
    (gptq, {"quant_method": "gptq", "bits": 4}, "group_size"),
    (compressed_tensors, _scheme(type="float"), "integer"),
    (compressed_tensors, _scheme(strategy="tensor"), "tensor"),
    (compressed_tensors, _scheme(num_bits=6), "6 bits"),
    (compressed_tensors, {**_scheme(), "format": "float-quantized"}, "float-quantized"),
    (compressed_tensors, {"quant_method": "compressed-tensors"}, "config_groups"),
])  # fmt: skip
def test_configs_that_are_not_read_say_why(coder: Any, config: dict, message: str) -> None:
    with pytest.raises(SqftError, match=message):
        coder.read_config(config)


def test_configs_name_what_stays_float() -> None:
    layers = {"model.layers.0.up": random_layer(4)}
    config = compressed_tensors.make_config(layers, ["model.layers.0.down"], "pack-quantized")
    assert config["ignore"] == ["lm_head", "model.layers.0.down"]
    config = gptq.make_config(layers, ["model.layers.0.down"], "gptq_v2")
    assert config["dynamic"] == {r"-:^model\.layers\.0\.down$": {}}
    assert config["modules_in_block_to_quantize"] == [["model.layers.0.up"]]
    assert gptq.read_config(config) == Settings(4, 32, False, "gptq_v2")
    assert gptq.make_config(layers, [], "gptq_v2").keys().isdisjoint({"dynamic", "modules_in_block_to_quantize"})


def test_act_order_is_said_only_of_scattered_groups() -> None:
    for scrambled in (False, True):
        layers = {"layer": random_layer(4, scrambled=scrambled)}
        assert gptq.make_config(layers, [], "gptq_v2")["desc_act"] is scrambled
        config = compressed_tensors.make_config(layers, [], "pack-quantized")
        assert config["config_groups"]["group_0"]["weights"]["actorder"] == ("group" if scrambled else None)


MINE = Format(
    "words", ("mine",),
    encode=lambda layer, version: {"words": layer.qweight, **{k: v for k, v in layer.state_dict().items() if k != "qweight"}},
    decode=lambda name, tensors, settings: gptq.decode(name, {"qweight": tensors["words"], **tensors}, settings),
    read_config=lambda config: gptq.read_config({**config, "checkpoint_format": "gptq_v2"}),
    make_config=lambda layers, floats, version: {**gptq.make_config(layers, floats, "gptq_v2"), "quant_method": "mine"},
)  # fmt: skip


def test_a_format_from_outside_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS._entries, "mine", f"{__name__}:MINE")
    model = pico_model()
    sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=32))
    mark_packed(model, "mine")
    sqft.save(model, pico_tokenizer(), tmp_path / "m")
    assert "model.layers.0.mlp.up_proj.words" in SafetensorsReader(tmp_path / "m").layout
    state = sqft.load(tmp_path / "m")[0].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_packed_words_stay_where_they_lie(tmp_path: Path) -> None:
    """A loaded compressed-tensors folder has no copy of its integers, computes the same, and goes into other formats."""
    model = pico_model("llama")
    sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=32, symmetric=False))
    sqft.save(model, pico_tokenizer(), tmp_path / "stored")
    loaded, tokenizer = sqft.load(tmp_path / "stored")
    layer, own = (m.model.layers[0].mlp.up_proj for m in (loaded, model))
    assert layer.qweight.mT.is_contiguous()  # as the file has them
    assert torch.equal(layer.dequantize(), own.dequantize()) and torch.equal(layer.integers(), own.integers())
    loaded.save_pretrained(tmp_path / "gptq")
    tokenizer.save_pretrained(tmp_path / "gptq")
    again, _ = sqft.load(tmp_path / "gptq")
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())
