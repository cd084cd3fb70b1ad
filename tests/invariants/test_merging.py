"""What a merge promises: all that was trained is in the merged model; else nothing is written and nothing changed."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from pico import pico_model, pico_tokenizer
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import sqft
import sqft.merging.changes
import sqft.merging.stage
from sqft import probe
from sqft.adapters.peft_bridge import adapter_layers
from sqft.folders import base_of
from sqft.formats.checkpoint import packed_layers
from sqft.models.discover import describe
from sqft.sparsity.masks import collect_masks, load_masks

INT4 = sqft.QuantizeConfig(group_size=32)
RARE = [250, 251]  # token ids that the sample text has not
SEEN = torch.arange(240, 258)[None]


def make_base(kind: str, folder: Path, tokens, family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A pico model ('dense'), pruned ('sparse') and packed ('packed'), loaded from its folder."""
    model = pico_model(family, dtype)
    if kind != "dense":
        sqft.sparsify(model, sqft.SparsifyConfig(), tokens)
    if kind == "packed":
        sqft.quantize(model, INT4, tokens)
    sqft.save(model, pico_tokenizer(), folder / "base")
    return sqft.load(folder / "base")[0]


def config(kind: str, **options: Any) -> LoraConfig:
    if kind == "dense":
        return LoraConfig(r=4, lora_alpha=8, **options)
    return sqft.SqftConfig(r=4, lora_alpha=8, quantization_aware=kind == "packed", **options)


def move(adapter: Any) -> Any:
    """Moves everything that would be trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05)
    return adapter.eval()


@torch.no_grad()
def logits(model: Any, ids=SEEN) -> torch.Tensor:
    return model(ids).logits


def merge_both(adapter: Any, folder: Path) -> tuple[Any, Any]:
    """The adapter merged from a folder, and live."""
    sqft.save(adapter, pico_tokenizer(), folder / "adapter")
    sqft.merge(folder / "adapter", out=folder / "merged")
    return sqft.load(folder / "merged")[0], sqft.merge(adapter)


def assert_same(one: Any, other: Any) -> None:
    state, expected = one.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert not [name for name in state if not torch.equal(state[name], expected[name])]


# --- mixed precision ---------------------------------------------------------------------------------------------


def train_in_bfloat16(adapter: Any, tokenizer, folder: Path) -> None:
    ids = tokenizer("the quick brown fox jumps over the lazy dog")["input_ids"]
    arguments = TrainingArguments(output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, bf16=True,
                                  use_cpu=True, learning_rate=0.02, report_to=[], save_strategy="no",
                                  remove_unused_columns=False)  # fmt: skip
    Trainer(model=adapter, args=arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 16).train()


@pytest.mark.parametrize("kind", ["sparse", "packed"])
def test_bf16_training_on_a_float32_base_can_be_merged(kind: str, tmp_path: Path, tokens) -> None:
    """Accelerate's autocast stays on the model that it trained: what is compared must be computed without it."""
    tokenizer = pico_tokenizer()
    adapter = sqft.attach(make_base(kind, tmp_path, tokens), config(kind))
    train_in_bfloat16(adapter, tokenizer, tmp_path / "work")
    train_in_bfloat16(adapter, tokenizer, tmp_path / "work")  # a second training wraps it again
    sqft.save(adapter, tokenizer, tmp_path / "adapter")
    probe.write_probe(probe.probe(adapter, tokenizer), tmp_path / "adapter")
    metrics = sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    assert metrics["zeros_kept"] == 1.0 and metrics["max_logit_difference"] == 0.0
    wrapped = adapter.forward
    expected = probe.logits(adapter, SEEN)
    assert adapter.forward is wrapped, "the user's model is left as it was"
    merged = sqft.merge(adapter)
    assert torch.equal(logits(merged), expected)
    assert_same(sqft.load(tmp_path / "merged")[0], merged)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
def test_trl_with_its_default_precision_can_be_merged(tmp_path: Path, tokens) -> None:
    from trl import SFTConfig, SFTTrainer

    tokenizer = pico_tokenizer()
    adapter = sqft.attach(make_base("sparse", tmp_path, tokens), config("sparse"))
    arguments = SFTConfig(output_dir=str(tmp_path / "work"), max_steps=4, per_device_train_batch_size=4, use_cpu=True,
                          learning_rate=0.01, report_to=[], max_length=64)  # fmt: skip
    data = Dataset.from_list([{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(16)])
    SFTTrainer(model=adapter, args=arguments, train_dataset=data, processing_class=tokenizer).train()
    assert arguments.bf16, "TRL's default"
    expected = probe.logits(adapter, SEEN)
    assert torch.equal(logits(sqft.merge(adapter)), expected)
    assert sqft.merge(tmp_path / "work" / "checkpoint-4", out=tmp_path / "merged")["zeros_kept"] == 1.0


def test_the_probe_is_computed_without_autocast(tokens) -> None:
    model = pico_model()
    expected = probe.logits(model, SEEN)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(probe.logits(model, SEEN), expected)


# --- a merge that fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "sparse", "packed"])
@pytest.mark.parametrize("error", [sqft.VerificationError, KeyboardInterrupt])
def test_a_failed_merge_leaves_the_live_adapter_as_it_was(
    kind: str, error: type[BaseException], tmp_path: Path, tokens, monkeypatch
) -> None:
    options = {"search_space": [4, 2]} if kind == "sparse" else {"modules_to_save": ["norm"]}
    adapter = move(
        sqft.attach(make_base(kind, tmp_path, tokens), config(kind, trainable_token_indices=RARE, **options))
    )
    before, modules = logits(adapter), dict(adapter.named_modules())
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}

    def fail(*args) -> None:
        raise error("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr("sqft.verify.check_logits", fail)
        with pytest.raises(error, match="on purpose"):
            sqft.merge(adapter, sqft.MergeConfig(ranks="minimal" if kind == "sparse" else None))
    after = dict(adapter.named_modules())
    assert after.keys() == modules.keys() and all(after[name] is modules[name] for name in modules)
    assert torch.equal(logits(adapter), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter.state_dict().items())
    assert "default" in adapter.get_base_model().peft_config
    sqft.merge(adapter)  # and it can be merged still


def test_an_adapter_of_nan_is_named_as_such(tmp_path: Path, tokens) -> None:
    adapter = sqft.attach(make_base("sparse", tmp_path, tokens), config("sparse"))
    next(iter(adapter_layers(adapter).values())).lora_B["default"].weight.data.fill_(torch.nan)
    with pytest.raises(sqft.VerificationError, match="diverged"):
        sqft.merge(adapter)


def test_an_adapter_that_is_merged_already_is_refused(tmp_path: Path, tokens) -> None:
    adapter = move(sqft.attach(make_base("packed", tmp_path, tokens), config("packed")))
    adapter.merge_adapter()
    with pytest.raises(sqft.UsageError, match="unmerge_adapter"):
        sqft.merge(adapter)


# --- all that an adapter trains ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "sparse", "packed"])
@pytest.mark.parametrize("family, options", [
    ("llama", {"trainable_token_indices": RARE}), ("qwen2", {"trainable_token_indices": RARE}),
    ("qwen2", {"modules_to_save": ["embed_tokens", "lm_head"]}), ("llama", {"modules_to_save": ["norm"]}),
    ("llama", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("opt", {"bias": "all"}), ("qwen2", {"bias": "lora_only"}),
], ids=str)  # fmt: skip
def test_everything_that_an_adapter_trains_is_merged(
    kind: str, family: str, options: dict, tmp_path: Path, tokens
) -> None:
    """Tied and untied; the sample text has none of the trained tokens, so that logits on it would not tell."""
    adapter = move(sqft.attach(make_base(kind, tmp_path, tokens, family), config(kind, **options)))
    base_file = (tmp_path / "base" / "model.safetensors").read_bytes()
    expected = logits(adapter)
    assert (expected - logits(sqft.load(tmp_path / "base")[0])).abs().max() > 0.01
    for merged in (both := merge_both(adapter, tmp_path)):
        if kind == "dense":
            torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
        else:
            assert torch.equal(logits(merged), expected)
    assert_same(*both)
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == base_file


def test_trainable_token_indices_are_merged_from_a_folder(tmp_path: Path, tokens) -> None:
    adapter = sqft.attach(make_base("sparse", tmp_path, tokens), config("sparse", trainable_token_indices=RARE))
    delta = adapter.get_base_model().model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    delta.data.add_(1.0)  # of all that is trained, only the tokens move
    sqft.save(adapter, pico_tokenizer(), tmp_path / "adapter")
    sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["model.embed_tokens.weight"]
    assert torch.equal(after["model.embed_tokens.weight"][RARE], delta)


@pytest.mark.parametrize("family, kind, options, message", [
    ("llama", "sparse", {"modules_to_save": ["embed_tokens"]}, "apart from lm_head.weight.*one tensor"),
    ("llama", "sparse", {"modules_to_save": ["lm_head"]}, "apart from model.embed_tokens.weight.*one tensor"),
    ("llama", "sparse", {"modules_to_save": ["o_proj"]}, r"modules_to_save trains model.layers.0.self_attn.o_proj, which is pruned"),
    ("llama", "dense", {"use_dora": True}, "model.layers.0.self_attn.q_proj by DoraLinearVariant"),
], ids=str)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name(
    family: str, kind: str, options: dict, message: str, tmp_path: Path, tokens
) -> None:
    model = make_base(kind, tmp_path, tokens, family)
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    adapter = move(get_peft_model(model, config(kind, **options)))  # sqft.attach refuses some of it before
    before = logits(adapter)
    with pytest.raises(sqft.UsageError, match=message):
        sqft.merge(adapter)
    assert torch.equal(logits(adapter), before)


def test_a_trained_tensor_that_merging_does_not_know_is_refused_by_name(tmp_path: Path, tokens, monkeypatch) -> None:
    adapter = sqft.attach(make_base("sparse", tmp_path, tokens), config("sparse"))
    monkeypatch.setattr(sqft.merging.changes, "get_peft_model_state_dict",
                        lambda *args, **kwargs: {"base_model.model.model.norm.lora_new": torch.ones(1)})  # fmt: skip
    with pytest.raises(sqft.UsageError, match=r"trains model\.norm\.lora_new"):
        sqft.merge(adapter)


def test_verification_compares_every_trained_tensor(tmp_path: Path, tokens, monkeypatch) -> None:
    """Not only logits of a sample: here a row of the embedding is lost that the sample does not read."""
    adapter = move(sqft.attach(make_base("packed", tmp_path, tokens, "qwen2"),
                               config("packed", trainable_token_indices=RARE)))  # fmt: skip
    sqft.save(adapter, pico_tokenizer(), tmp_path / "adapter")
    original = sqft.merging.stage.save_packed

    def lose_a_row(model, tokenizer, folder, size, change) -> None:
        model.model.embed_tokens.weight[RARE[0]] = 0
        original(model, tokenizer, folder, size, change)

    monkeypatch.setattr(sqft.merging.stage, "save_packed", torch.no_grad()(lose_a_row))
    with pytest.raises(
        sqft.VerificationError, match=r"embed_tokens\.weight of the merged model is not what was trained"
    ):
        sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_and_folder_merges_of_lora_are_the_same(dtype: torch.dtype, tmp_path: Path, tokens) -> None:
    adapter = move(sqft.attach(make_base("dense", tmp_path, tokens, dtype=dtype), config("dense")))
    assert_same(*merge_both(adapter, tmp_path))


# --- masks, counting, devices ------------------------------------------------------------------------------------


def test_a_merge_of_a_foreign_sparse_base_keeps_the_masks_of_all_its_weights(tmp_path: Path) -> None:
    model = pico_model()
    for weight in describe(model).weights():
        weight.write(weight.read() * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5))
    model.save_pretrained(tmp_path / "base")
    pico_tokenizer().save_pretrained(tmp_path / "base")
    adapter = move(sqft.attach(sqft.load(tmp_path / "base")[0], config("sparse")))
    names = describe(model).names()
    assert len(adapter_layers(adapter)) == 10 and len(names) == 14
    _, live = merge_both(adapter, tmp_path)
    assert sorted(load_masks(tmp_path / "merged")) == sorted(collect_masks(live)) == sorted(names)


def test_a_packed_weight_is_dequantized_at_most_twice(tmp_path: Path, tokens, monkeypatch) -> None:
    """Once for the un-merged logits and once for the merged ones: counting and comparing take the integers.

    An adapted weight is built twice un-merged (as served, for its logits, and for the integers that are stored) and
    de-quantized once merged: the three things that verification compares. To take the integers from the weight that
    the un-merged forward built would need that forward to be another one than what is served, or all float weights to
    be held.
    """
    adapter = move(sqft.attach(make_base("packed", tmp_path, tokens), config("packed")))
    sqft.save(adapter, pico_tokenizer(), tmp_path / "adapter")
    layers = packed_layers(sqft.load(tmp_path / "base")[0])
    names = {layer.scales.numpy().tobytes(): name for name, layer in layers.items()}
    adapted = set(adapter_layers(adapter))
    assert len(names) == 14 and len(adapted) == 10
    counts: dict[str, Counter[str]] = {"dequantized": Counter(), "quant_aware_weight": Counter()}

    def counted(kernel: str, function: Any) -> Any:
        def call(packed, *args):
            counts[kernel][names[packed.scales.numpy().tobytes()]] += 1
            return function(packed, *args)

        return call

    for path, module in list(sys.modules.items()):
        if (
            path.startswith("sqft.") and path != "sqft.kernels.reference"
        ):  # that is below the functions that are counted
            for kernel in counts:
                if hasattr(module, kernel):
                    monkeypatch.setattr(module, kernel, counted(kernel, getattr(module, kernel)))
    assert sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")["zeros_kept"] == 1.0
    assert counts["dequantized"] == {name: 1 if name in adapted else 2 for name in names.values()}
    assert counts["quant_aware_weight"] == dict.fromkeys(adapted, 2)


def test_a_folder_is_merged_on_the_device_of_the_config(trained: Path, tmp_path: Path, monkeypatch) -> None:
    devices: list[Any] = []
    original = sqft.folders.pick_device
    monkeypatch.setattr(sqft.folders, "pick_device", lambda name: devices.append(name) or original("cpu"))
    sqft.merge(trained, sqft.MergeConfig(device="xpu"), out=tmp_path / "merged")
    assert set(devices) == {"xpu"} and base_of(trained)
