"""``Weight``: one linear weight, wherever it lies and however it is laid out."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from peft import LoraConfig
from pico import pico_model, pico_tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import sqft
from sqft.models.discover import describe
from sqft.models.weights import Weight, block_index, is_linear, linear_weights
from sqft.quantization.linear import QuantLinear

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Two of them, as transformers keeps them: one parameter [E, O, I], or [E, I, O]."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 6, 4) if transposed else torch.randn(2, 4, 6))


def weight_of(kind: str) -> tuple[Weight, object]:
    """A weight [4, 6] and what its layer computes."""
    torch.manual_seed(0)
    if kind == "linear":
        linear = nn.Linear(6, 4, bias=False)
        return Weight("layer", linear), linear
    if kind == "conv1d":
        conv = Conv1D(4, 6)
        return Weight("layer", conv), conv
    experts = Experts("transposed" in kind)
    product = (lambda x: x @ experts.up_proj[1]) if "transposed" in kind else (lambda x: x @ experts.up_proj[1].mT)
    return Weight("experts.1", experts, parameter="up_proj", index=1, transposed="transposed" in kind), product


KINDS = pytest.mark.parametrize("kind", ["linear", "conv1d", "expert", "transposed expert"])


@KINDS
def test_a_weight_reads_as_outputs_by_inputs(kind: str) -> None:
    weight, layer = weight_of(kind)
    assert weight.shape == (4, 6) and not weight.packed and weight.dtype == torch.float32
    torch.testing.assert_close(X @ weight.read().mT, layer(X))
    assert not weight.read().requires_grad


@KINDS
def test_a_write_leaves_the_old_tensor_alone(kind: str) -> None:
    """It may be mapped from a file, or another's too."""
    weight, layer = weight_of(kind)
    old = next(weight.module.parameters())
    before = old.detach().clone()
    weight.write(torch.arange(24.0).view(4, 6).double())
    assert torch.equal(old, before)
    assert torch.equal(weight.read(), torch.arange(24.0).view(4, 6)) and weight.read().dtype == torch.float32
    torch.testing.assert_close(X @ weight.read().mT, layer(X))
    parameter = next(weight.module.parameters())
    assert parameter.requires_grad and parameter.is_contiguous()
    with pytest.raises(sqft.SqftError, match=r"is \[4, 6\], what is to be written is \[6, 4\]"):
        weight.write(torch.zeros(6, 4))


@KINDS
def test_a_mask_belongs_to_its_weight(kind: str) -> None:
    weight, _ = weight_of(kind)
    assert weight.mask is None and weight.packed_mask is None
    mask_OI = torch.rand(4, 6) < 0.5
    weight.set_mask(mask_OI)
    assert torch.equal(weight.mask, mask_OI)
    assert "mask" not in "".join(weight.module.state_dict())
    if "expert" in kind:
        other = Weight("experts.0", weight.module, parameter="up_proj", index=0, transposed="transposed" in kind)
        assert other.mask is None
        other.set_mask(~mask_OI)
        assert torch.equal(weight.mask, mask_OI) and torch.equal(other.mask, ~mask_OI)


def test_writing_all_slices_copies_their_parameter_once() -> None:
    weight, _ = weight_of("expert")
    other = Weight("experts.0", weight.module, parameter="up_proj", index=0)
    weight.write(torch.ones(4, 6))
    place = next(weight.module.parameters()).data_ptr()
    other.write(torch.zeros(4, 6))
    assert next(weight.module.parameters()).data_ptr() == place
    assert weight.read().all() and not other.read().any()


def test_a_packed_weight_is_counted_by_its_integers() -> None:
    model = pico_model()
    sqft.quantize(model, sqft.QuantizeConfig(bits=4, method="rtn", group_size=32))
    weight = next(describe(model).weights())
    layer = weight.module
    assert weight.packed and isinstance(layer, QuantLinear)
    layer.scales[0, 2] = 0  # as a foreign checkpoint may have
    assert torch.equal(weight.nonzero(), weight.read() != 0) and not weight.nonzero()[2].any()
    with pytest.raises(sqft.SqftError, match="is packed"):
        weight.write(weight.read())


def test_replace_changes_the_model_and_the_block() -> None:
    model = pico_model()
    block = describe(model).blocks[1]
    new = nn.Linear(32, 64, bias=False)
    block.weights["model.layers.1.mlp.up_proj"].replace(new)
    assert model.get_submodule("model.layers.1.mlp.up_proj") is new
    assert block.weights["model.layers.1.mlp.up_proj"].module is new


def test_block_index() -> None:
    assert block_index("model.layers.13.mlp.experts.5.up_proj") == 13 and block_index("lm_head") is None


def test_linear_weights_are_those_of_blocks_without_adapters() -> None:
    model = pico_model()
    names = describe(model).names()
    assert sorted(weight.name for weight in linear_weights(model)) == sorted(names)
    assert is_linear(Conv1D(4, 6)) and not is_linear(nn.Conv1d(4, 6, 1))
    assert len(list(linear_weights(sqft.attach(model, LoraConfig(r=2))))) == len(names)


def offloaded(how: str, folder: Path) -> PreTrainedModel:
    """A model whose weights accelerate brings for each forward, from memory or from a disk."""
    model = pico_model()
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk_offload":
        return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
               "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    return accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=str(folder))


OFFLOADS = pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])


@OFFLOADS
def test_an_offloaded_weight_is_read_and_written_where_it_is_kept(how: str, tmp_path: Path, tokens: Tensor) -> None:
    plain, model = pico_model(), offloaded(how, tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    for ours, theirs in zip(describe(model).weights(), describe(plain).weights(), strict=True):
        assert ours.device.type == "cpu" and torch.equal(ours.read(), theirs.read())
        for weight in (ours, theirs):
            weight.write(weight.read() * 2)
    with torch.no_grad():
        assert torch.equal(model(tokens[:2]).logits, plain(tokens[:2]).logits)


@OFFLOADS
def test_an_offloaded_model_is_pruned_quantized_and_saved(how: str, tmp_path: Path, tokens: Tensor) -> None:
    plain, model = pico_model(), offloaded(how, tmp_path / "offload")
    for each in (plain, model):
        sqft.sparsify(each, sqft.SparsifyConfig(method="magnitude"))
    sqft.save(model, pico_tokenizer(), tmp_path / "sparse")
    found = sqft.load(tmp_path / "sparse")[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.state_dict().items())
    for each in (plain, model):
        sqft.quantize(each, sqft.QuantizeConfig(method="rtn", group_size=32))
    with torch.no_grad():
        assert torch.equal(model(tokens[:2]).logits, plain(tokens[:2]).logits)
    sqft.save(model, pico_tokenizer(), tmp_path / "packed")
    found = sqft.load(tmp_path / "packed")[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.state_dict().items())


def test_a_family_with_transposed_weights_is_pruned_quantized_and_loaded(tmp_path: Path, tokens: Tensor) -> None:
    """Wanda's mask is that of the same weight in an ``nn.Linear``."""
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=260, n_positions=512)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    first = next(describe(model).weights())
    w_OI, norm_I = first.read().clone(), torch.zeros(32)
    with torch.no_grad():
        x = model.transformer.h[0].ln_1(model.transformer.wte(tokens) + model.transformer.wpe.weight[: tokens.shape[1]])
        norm_I = x.double().flatten(0, 1).square().sum(0).sqrt()
    sqft.sparsify(model, sqft.SparsifyConfig(), tokens)
    kept = (w_OI.double().abs() * norm_I).argsort(1)[:, 16:]
    assert torch.equal(first.mask, torch.zeros(96, 32, dtype=torch.bool).scatter(1, kept, True))
    sqft.quantize(model, sqft.QuantizeConfig(group_size=32), tokens)
    assert all(weight.packed and not (weight.nonzero() & ~weight.mask).any() for weight in describe(model).weights())
    sqft.save(model, pico_tokenizer(), tmp_path / "m")
    loaded, _ = sqft.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(model(tokens[:2]).logits, loaded(tokens[:2]).logits)
