"""The cases of PEFT's own LoRA tests, on pico models with our layers: each passes, or is refused with a sentence.

The list, for users, is the table of docs/peft.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from pico import pico_folder

import sqft
from sqft.adapters.peft_bridge import adapter_layers, load_adapter
from sqft.quantization.linear import QuantLinear
from sqft.sparsity.masks import mask_of

KINDS: dict[str, dict[str, Any]] = {
    "sparse-peft": {}, "qa-sparse-peft": {"quantization_aware": True}, "sqft": {"sparse_adapter": False},
}  # fmt: skip
MERGING = [kind for kind in KINDS if kind != "sqft"]
TARGETS = ["q_proj", "up_proj"]


@pytest.fixture(scope="module")
def bases(sparse: Path, tokens, tmp_path_factory) -> dict[str, Path]:
    packed = tmp_path_factory.mktemp("packed") / "model"
    sqft.quantize(sparse, sqft.QuantizeConfig(group_size=32), tokens, out=packed)
    return {kind: sparse if kind == "sparse-peft" else packed for kind in KINDS}


@pytest.fixture(scope="module")
def biased(tokens, tmp_path_factory) -> dict[str, Path]:
    """A family whose linear layers have biases."""
    root = tmp_path_factory.mktemp("biased")
    pico_folder(root / "dense", "opt")
    sqft.sparsify(root / "dense", sqft.SparsifyConfig(), tokens, out=root / "sparse")
    sqft.quantize(root / "sparse", sqft.QuantizeConfig(group_size=32), tokens, out=root / "packed")
    return {kind: root / ("sparse" if kind == "sparse-peft" else "packed") for kind in KINDS}


def config(kind: str, **options: Any) -> sqft.SqftConfig:
    """Of an adapter that changes the output at once."""
    return sqft.SqftConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False,
                              "task_type": "CAUSAL_LM", **KINDS[kind], **options})  # fmt: skip


def adapted(bases, kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(sqft.load(bases[kind])[0], config(kind, **options)).eval()


def reloaded(bases, kind: str, folder: Path) -> Any:
    """Plain LoRA on an INT base is saved as plain LoRA, whose layers PEFT does not have for it: sqft.load's way."""
    base = sqft.load(bases[kind])[0]
    return load_adapter(base, folder) if kind == "sqft" else PeftModel.from_pretrained(base, str(folder))


@torch.no_grad()
def logits(model, tokens, **arguments: Any) -> torch.Tensor:
    return model.eval()(input_ids=tokens, **arguments).logits


def zeros_kept(model) -> None:
    for layer in adapter_layers(model).values():
        base = layer.get_base_layer()
        if (mask := mask_of(base)) is not None:
            kept = base.nonzero() if isinstance(base, QuantLinear) else base.weight
            assert not kept[~mask].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}, {"use_rslora": True}, {"lora_alpha": 4}])
def test_save_and_load(kind: str, options: dict, bases, tokens, tmp_path: Path) -> None:
    model = adapted(bases, kind, **options)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(reloaded(bases, kind, tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind: str, bases, tokens) -> None:
    model = adapted(bases, kind)
    torch.manual_seed(1)
    other = get_peft_model(sqft.load(bases[kind])[0], config(kind)).eval()
    assert not torch.equal(logits(other, tokens), logits(model, tokens))
    found = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not found.unexpected_keys and torch.equal(logits(other, tokens), logits(model, tokens))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", MERGING)
def test_merge_unmerge_and_unload(kind: str, safe: bool, bases, tokens) -> None:
    model, base = adapted(bases, kind), logits(sqft.load(bases[kind])[0], tokens)
    expected = logits(model, tokens)
    model.merge_adapter(safe_merge=safe)
    zeros_kept(model)
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-4, rtol=0)
    model.unmerge_adapter()
    zeros_kept(model)
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-4, rtol=0)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, tokens), base, atol=1e-4, rtol=0)
    merged = model.merge_and_unload(safe_merge=safe)
    assert not adapter_layers(merged)
    torch.testing.assert_close(logits(merged, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", MERGING)
def test_safe_merge_refuses_nan(kind: str, bases) -> None:
    model = adapted(bases, kind)
    next(iter(adapter_layers(model).values())).lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)


def test_plain_lora_on_packed_does_not_merge(bases) -> None:
    with pytest.raises(sqft.UsageError, match="cannot be merged into an INT model"):
        adapted(bases, "sqft").merge_adapter()


@pytest.mark.parametrize("kind", KINDS)
def test_disable_and_unload(kind: str, bases, tokens) -> None:
    model, base = adapted(bases, kind), logits(sqft.load(bases[kind])[0], tokens)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), base)
    assert not torch.equal(logits(model, tokens), base)
    assert torch.equal(logits(model.unload(), tokens), base)


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_set_and_deleted(kind: str, bases, tokens) -> None:
    model = adapted(bases, kind)
    first = logits(model, tokens)
    torch.manual_seed(1)
    model.add_adapter("second", config(kind, r=2))
    assert torch.equal(logits(model, tokens), first)
    model.set_adapter("second")
    second = logits(model, tokens)
    assert not torch.equal(first, second)
    model.delete_adapter("default")
    assert torch.equal(logits(model, tokens), second)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("default")


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_add_weighted_adapter(how: str, bases, tokens) -> None:
    model = adapted(bases, "sparse-peft")
    model.add_adapter("second", config("sparse-peft"))
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type=how, svd_rank=8)
    model.set_adapter("both")
    assert torch.isfinite(logits(model, tokens)).all()
    layer: Any = next(iter(adapter_layers(model).values()))
    expected = 0.7 * layer.get_delta_weight("default") + 0.3 * layer.get_delta_weight("second")
    if how == "cat":  # the one that is exact
        torch.testing.assert_close(layer.get_delta_weight("both"), expected, atol=1e-5, rtol=1e-4)
    model.merge_adapter(["both"])
    zeros_kept(model)


def test_weighted_elastic_adapters_are_refused_where_the_rank_would_not_fit(bases) -> None:
    model = adapted(bases, "sparse-peft", search_space=[4, 2])
    model.add_adapter("second", config("sparse-peft", search_space=[4, 2]))
    with pytest.raises(sqft.UsageError, match="sqft.extract"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="cat")


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batches(kind: str, bases, tokens) -> None:
    model = adapted(bases, kind)
    names = ["default", "__base__"] * 3
    if kind == "sqft":
        mixed, whole = logits(model, tokens, adapter_names=names), logits(model, tokens)
        torch.testing.assert_close(mixed[::2], whole[::2], atol=1e-5, rtol=0)
        with model.disable_adapter():
            torch.testing.assert_close(mixed[1::2], logits(model, tokens)[1::2], atol=1e-5, rtol=0)
        return
    with pytest.raises(sqft.SqftError, match="cannot be mixed within a batch"):
        logits(model, tokens, adapter_names=names)


def test_two_masked_adapters_at_once_are_refused(bases, tokens) -> None:
    model = adapted(bases, "sparse-peft")
    model.add_adapter("second", config("sparse-peft"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(sqft.SqftError, match="one masked adapter at a time"):
        logits(model, tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_casts(kind: str, dtype, bases, tokens) -> None:
    for automatic in (True, False):
        model = sqft.load(bases[kind])[0].to(dtype)
        model = get_peft_model(model, config(kind), autocast_adapter_dtype=automatic)
        assert torch.isfinite(logits(model, tokens)).all()
        layer: Any = next(iter(adapter_layers(model).values()))
        follows = kind == "sparse-peft" and not automatic  # an INT weight's dtype says nothing
        assert layer.lora_A["default"].weight.dtype == (dtype if follows else torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind: str, reentrant: bool, bases, tokens) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(bases, kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert gradients[0]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("kind", KINDS)
def test_biases_are_trained_saved_and_loaded(kind: str, bias: str, biased, tokens, tmp_path: Path) -> None:
    model = adapted(biased, kind, bias=bias, target_modules=["q_proj", "fc1"])
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.endswith("bias") for name in trained) and all(p.grad is not None for p in trained.values())
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.1
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(reloaded(biased, kind, tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_modules_to_save(kind: str, bases, tokens, tmp_path: Path) -> None:
    model = adapted(bases, kind, modules_to_save=["norm"])
    model.base_model.model.model.norm.modules_to_save["default"].weight.data += 0.5
    model.save_pretrained(str(tmp_path))
    again = reloaded(bases, kind, tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    with pytest.raises(sqft.UsageError, match="would train all of"):
        sqft.attach(sqft.load(bases[kind])[0], config(kind, modules_to_save=["down_proj"]))


@pytest.mark.parametrize("kind", KINDS)
def test_trainable_tokens(kind: str, bases, tokens, tmp_path: Path) -> None:
    model = adapted(bases, kind, trainable_token_indices=[3, 5, int(tokens[0, 0])])
    before = logits(model, tokens)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 0.5
    assert not torch.equal(logits(model, tokens), before)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(reloaded(bases, kind, tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize(("options", "expected"), [
    ({"target_modules": r".*\.1\..*(q|v)_proj"}, ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]),
    ({"layers_to_transform": 1}, ["layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"]),
    ({"layers_to_transform": [0], "layers_pattern": "layers"}, ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"]),
    ({"exclude_modules": ["q_proj"]}, ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]),
])  # fmt: skip
def test_which_modules(options: dict, expected: list[str], bases) -> None:
    found = adapter_layers(adapted(bases, "sparse-peft", **options))
    assert sorted(found) == sorted(f"model.{name}" for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_and_alpha_patterns(kind: str, bases, tokens, tmp_path: Path) -> None:
    model = adapted(bases, kind, rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 6})
    layer: Any = adapter_layers(model)["model.layers.0.mlp.up_proj"]
    assert layer.lora_A["default"].weight.shape[0] == 2 and layer.scaling["default"] == 3
    model.save_pretrained(str(tmp_path))
    again = reloaded(bases, kind, tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_hotswap_of_the_same_and_smaller_rank_passes_and_of_a_larger_one_is_refused(kind: str, bases, tokens, tmp_path: Path) -> None:  # fmt: skip
    expected = {}
    for rank in (2, 4, 6):
        other = get_peft_model(sqft.load(bases[kind])[0], config(kind, r=rank))
        other.save_pretrained(str(tmp_path / str(rank)))
        expected[rank] = logits(other, tokens)
    model = adapted(bases, kind)
    for rank in (4, 2):
        hotswap_adapter(model, str(tmp_path / str(rank)), "default")
        torch.testing.assert_close(logits(model, tokens), expected[rank], atol=1e-5, rtol=0)
    hotswap_adapter(model, str(tmp_path / "6"), "default")
    with pytest.raises(sqft.SqftError, match="rank 6 was swapped in"):
        logits(model, tokens)


@pytest.mark.parametrize("kind", MERGING)
def test_torch_compile(kind: str, bases, tokens) -> None:
    model = adapted(bases, kind)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")(input_ids=tokens).logits
    torch.testing.assert_close(compiled, logits(model, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", ["sparse-peft", "lora"])
def test_a_second_adapter_of_another_kind_is_refused(first: str, bases) -> None:
    """Beside a masked adapter plain LoRA would be masked, and beside plain LoRA a masked one would be dense."""
    plain = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    if first == "lora":
        model = get_peft_model(sqft.load(bases["sparse-peft"])[0], plain)
        with pytest.raises(ValueError, match="sparse_adapter"):  # PEFT's own refusal of an option it does not know
            model.add_adapter("second", config("sparse-peft"))
        with pytest.raises(ValueError, match="search_space"):
            model.add_adapter("third", config("sqft", search_space=[4, 2]))
        return
    model = adapted(bases, first)
    with pytest.raises(sqft.SqftError, match=r"kind lora cannot stand beside one of kind sparse-peft"):
        model.add_adapter("second", plain)
