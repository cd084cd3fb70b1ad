"""Which weights count as pruned, where no mask says so: decided once, in ``ensure_masks``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from pico import pico_folder, pico_model, pico_tokenizer
from safetensors.torch import save_file
from torch import nn

import sqft
from sqft.adapters.peft_bridge import adapter_layers, is_masked
from sqft.errors import SqftError, UsageError
from sqft.formats.checkpoint import packed_layers
from sqft.keys import MANIFEST, MASKS
from sqft.models.discover import describe
from sqft.sparsity.masks import collect_masks, ensure_masks, load_masks, mask_of

RTN = {"method": "rtn", "group_size": 32}


def with_zeros(share: float, only: str = "") -> nn.Module:
    """A float model that another tool wrote: this share of its linear weights is zero, without masks."""
    model = pico_model()
    torch.manual_seed(1)
    for weight in describe(model).weights():
        if only in weight.name:
            weight.write(weight.read() * (torch.rand(weight.shape) >= share))
    return model


def packed(bits: int, share: float = 0.0) -> nn.Module:
    model = with_zeros(share)
    sqft.quantize(model, sqft.QuantizeConfig(bits=bits, **RTN))
    return model


def zeros(model: nn.Module) -> float:
    weights = list(describe(model).weights())
    return sum(int((~weight.nonzero()).sum()) for weight in weights) / sum(weight.read().numel() for weight in weights)


def test_a_dense_model_with_some_zeros_is_dense() -> None:
    """As GGUF gives: de-quantized Gemma has 4.7 % zeros."""
    model = with_zeros(0.047)
    assert ensure_masks(model) == [] and not collect_masks(model)
    with pytest.raises(sqft.SqftError, match="not sparse"):
        sqft.attach(model, sqft.SqftConfig(r=4))
    assert not is_masked(sqft.attach(model, LoraConfig(r=4)))


def test_quantize_freezes_nothing_of_a_dense_model_with_some_zeros() -> None:
    model = with_zeros(0.047)
    metrics = sqft.quantize(model, sqft.QuantizeConfig(bits=4, **RTN))
    assert metrics["pruned"] == 0 and metrics["zeros"] > 0 and not collect_masks(model)


def test_plain_lora_merges_into_a_dense_model_with_some_zeros() -> None:
    model = sqft.attach(with_zeros(0.05), LoraConfig(r=4, init_lora_weights=False))
    assert zeros(sqft.merge(model)) < 0.04  # filled, where adapted


@pytest.mark.parametrize("bits, least", [(4, 0.08), (2, 0.3)])
def test_a_dense_int_model_is_dense(bits: int, least: float) -> None:
    model = packed(bits)
    assert zeros(model) > least
    assert ensure_masks(model) == [] and not collect_masks(model)
    with pytest.raises(sqft.SqftError, match="mask='zeros'"):
        sqft.attach(model, sqft.SqftConfig(r=4, quantization_aware=True))


def test_adapters_on_dense_int_move_what_rounded_to_zero() -> None:
    model = packed(4)
    before = {name: layer.nonzero() for name, layer in packed_layers(model).items()}
    adapted = sqft.attach(model, sqft.SqftConfig(r=4, sparse_adapter=False, quantization_aware=True))
    for layer in adapter_layers(adapted).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    names = list(adapter_layers(adapted))
    merged = sqft.merge(adapted)
    moved = sum(int((packed_layers(merged)[name].nonzero() & ~before[name]).sum()) for name in names)
    assert moved > 100


def test_a_foreign_sparse_model_keeps_the_masks_of_all_its_weights(tmp_path: Path, examples) -> None:
    model = with_zeros(0.6)
    expected = {weight.name: weight.nonzero() for weight in describe(model).weights()}
    model.save_pretrained(tmp_path / "foreign")
    pico_tokenizer().save_pretrained(tmp_path / "foreign")
    config = sqft.TrainConfig(max_steps=2, batch_size=4, r=4, learning_rate=0.02)
    sqft.train(tmp_path / "foreign", config, examples, out=tmp_path / "adapter")
    sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    merged, _ = sqft.load(tmp_path / "merged")
    assert len(load_masks(tmp_path / "merged")) == 14
    assert all(torch.equal(mask_of(merged.get_submodule(name)), mask) for name, mask in expected.items())


def test_each_weight_of_a_foreign_model_is_decided_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    model = with_zeros(0.5, only="mlp")
    with caplog.at_level("INFO", logger="sqft"):
        found = ensure_masks(model)
    assert found == [weight.name for weight in describe(model).weights() if "mlp" in weight.name]
    assert "6 of 14" in caplog.text
    assert ensure_masks(model) == [] and len(collect_masks(model)) == 6


@pytest.mark.parametrize("m", [8, 16])
def test_a_pattern_that_holds_is_sparse_below_a_fifth(m: int) -> None:
    model = pico_model()
    for weight in describe(model).weights():
        w_OI = weight.read().clone()
        w_OI.view(w_OI.shape[0], -1, m)[..., 3] = 0
        weight.write(w_OI)
    assert len(ensure_masks(model)) == 14


def test_a_masks_owner_keeps_what_it_says(tokens) -> None:
    model = pico_model()
    sqft.sparsify(model, sqft.SparsifyConfig(exclude=["q_proj"]), tokens)
    for weight in describe(model).weights():
        weight.write(weight.read() * (torch.rand(weight.shape) < 0.5))  # more zeros: kept weights that are zero
    assert ensure_masks(model) == []
    assert all(weight.mask is None for weight in describe(model).weights() if "q_proj" in weight.name)


def test_zeros_of_a_foreign_packed_model_are_masks_when_asked_for(tmp_path: Path) -> None:
    sqft.save(packed(4, share=0.5), pico_tokenizer(), tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "masks")
    (tmp_path / "m" / "sqft.json").unlink()
    assert not collect_masks(sqft.load(tmp_path / "m")[0])
    model, tokenizer = sqft.load(tmp_path / "m", mask="zeros")
    weights = list(describe(model).weights())
    assert all(torch.equal(weight.mask, weight.nonzero()) for weight in weights)
    adapted = sqft.attach(model, sqft.SqftConfig(r=4, quantization_aware=True))
    sqft.save(adapted, tokenizer, tmp_path / "adapter", parent=tmp_path / "m")
    assert is_masked(sqft.load(tmp_path / "adapter")[0])  # needs no telling: the adapter is a masked one
    with pytest.raises(sqft.UsageError, match="mask 'ones'"):
        sqft.load(tmp_path / "m", mask="ones")


def test_load_puts_everything_on_the_device(tmp_path: Path) -> None:
    """``meta`` stands for an accelerator."""
    dense, sparse = pico_folder(tmp_path / "dense"), packed(4, share=0.5)
    sqft.save(sparse, pico_tokenizer(), tmp_path / "packed")
    for folder in (dense, tmp_path / "packed"):
        model, _ = sqft.load(folder, device="meta")
        assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}, folder
    adapted = sqft.attach(model, sqft.SqftConfig(r=4, quantization_aware=True))
    assert {layer.mask.device.type for layer in adapter_layers(adapted).values()} == {"meta"}
    dense_int = packed(4).to("meta")  # whose masks, of ones, are made now
    adapted = sqft.attach(dense_int, sqft.SqftConfig(r=4, sparse_adapter=False, quantization_aware=True))
    assert {layer.mask.device.type for layer in adapter_layers(adapted).values()} == {"meta"}
    with pytest.raises(sqft.UsageError, match="no device 'tpu'"):
        sqft.load(dense, device="tpu")


@pytest.mark.parametrize("form", ["own", "bool", "weights", "suffix"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masks_that_are_there_already_are_taken(family: str, form: str, tmp_path: Path) -> None:
    pico_folder(tmp_path / "dense", family)
    sqft.sparsify(tmp_path / "dense", sqft.SparsifyConfig(method="magnitude", pattern="2:4"), out=tmp_path / "other")
    other = sqft.load(tmp_path / "other")[0]
    masks = {weight.name: weight.parameter != 0 for weight in describe(other).weights()}
    given = tmp_path / "given.safetensors"
    if form == "own":
        shutil.copy(tmp_path / "other" / MASKS, given)
    elif form == "weights":
        given = tmp_path / "stripped"
        shutil.copytree(tmp_path / "other", given)
        shutil.rmtree(given / "masks")
        (given / MANIFEST).unlink()  # as another tool's
    else:
        values = {"bool": masks, "suffix": {f"{name}.weight_mask": mask.float() for name, mask in masks.items()}}
        save_file({name: mask.contiguous() for name, mask in values[form].items()}, given)
    told = sqft.sparsify(tmp_path / "dense", sqft.SparsifyConfig(mask=str(given)), out=tmp_path / "mine")
    assert told["sparsity"] == 0.5
    assert (tmp_path / "mine" / MASKS).read_bytes() == (tmp_path / "other" / MASKS).read_bytes()
    for mine, theirs in zip(
        describe(sqft.load(tmp_path / "mine")[0]).weights(), describe(other).weights(), strict=True
    ):
        assert torch.equal(mine.read(), theirs.read())


def test_given_masks_leave_others_dense_and_are_repaired(tmp_path: Path, tokens) -> None:
    model, given = pico_model(), tmp_path / "one.safetensors"
    weight = next(iter(describe(model).weights()))
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    before = weight.read().clone()
    save_file({weight.name: mask}, given)
    told = sqft.sparsify(model, sqft.SparsifyConfig(mask=str(given), repair="layer"), tokens)
    assert list(collect_masks(model)) == [weight.name] and torch.equal(mask_of(weight.module), mask)
    after = weight.read()
    assert not after[~mask].any() and not torch.equal(after[mask], before[mask])  # repaired
    assert told["by_module"][weight.name] == pytest.approx(float((~mask).float().mean()), abs=1e-6)


def test_masks_of_another_model_are_refused(tmp_path: Path, tokens) -> None:
    model, file = pico_model(), tmp_path / "masks.safetensors"
    name = describe(model).names()[0]
    for tensors, told in (({"a.b": torch.ones(2)}, "has no mask of any"), ({name: torch.ones(3, 5)}, "is [3, 5]")):
        save_file(tensors, file)
        with pytest.raises(UsageError, match=re.escape(told)):
            sqft.sparsify(model, sqft.SparsifyConfig(mask=str(file)), tokens)
    with pytest.raises(UsageError, match="does not exist"):
        sqft.sparsify(model, sqft.SparsifyConfig(mask=str(tmp_path / "nowhere")), tokens)
    file.write_bytes(b"no tensors")
    with pytest.raises(SqftError, match="corrupt"):
        sqft.sparsify(model, sqft.SparsifyConfig(mask=str(file)), tokens)
