"""sqft beside its neighbours: PEFT, transformers' Trainer, TRL, plain transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sqft
from sqft.adapters.peft_bridge import adapter_layers
from sqft.adapters.sparse import SparseLoraLinear


def merged_zeros(model) -> None:
    for layer in adapter_layers(model).values():
        assert isinstance(layer, SparseLoraLinear)
        weight = layer.merged_weight("default")
        assert not weight[layer.get_base_layer().weight == 0].any() and weight.any()


def rows(tokenizer) -> list[dict[str, list[int]]]:
    ids = tokenizer("the quick brown fox jumps over the lazy dog")["input_ids"]
    return [{"input_ids": ids, "labels": ids} for _ in range(16)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_unchanged(sparse: Path, tmp_path: Path, checkpointing: bool) -> None:
    model, tokenizer = sqft.load(sparse)
    peft_model = sqft.attach(model, sqft.SqftConfig(r=4, lora_alpha=8, lora_dropout=0.1))
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, save_steps=4,
                                  learning_rate=0.01, report_to=[], logging_steps=1, gradient_checkpointing=checkpointing,
                                  remove_unused_columns=False)  # fmt: skip
    trainer = Trainer(model=peft_model, args=arguments, train_dataset=rows(tokenizer))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    merged_zeros(peft_model)
    # Trainer's own resume finds our config class.
    again = Trainer(model=sqft.attach(sqft.load(sparse)[0], sqft.SqftConfig(r=4, lora_alpha=8, lora_dropout=0.1)),
                    args=arguments, train_dataset=rows(tokenizer))  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for (name, a), (_, b) in zip(peft_model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    # What Trainer wrote is merged like an adapter of sqft train, and verified.
    assert sqft.merge(tmp_path / "checkpoint-8", out=tmp_path / "merged")["zeros_kept"] == 1.0


def test_an_adapter_on_a_model_that_was_never_saved_says_so(dense: Path, tokens, tmp_path: Path) -> None:
    """Its base on disk is the dense one: loading it there would give another model without a word."""
    model, tokenizer = sqft.load(dense)
    sqft.sparsify(model, sqft.SparsifyConfig(), tokens)
    sqft.save(sqft.attach(model, sqft.SqftConfig(r=2)), tokenizer, tmp_path / "adapter")
    with pytest.raises(sqft.SqftError, match=r"not sparse.*save it"):
        sqft.load(tmp_path / "adapter")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
@pytest.mark.parametrize("elastic", [False, True])
def test_trl_sft_trainer_unchanged(sparse: Path, tmp_path: Path, elastic: bool) -> None:
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = sqft.load(sparse)
    options = {"search_space": [4, 2]} if elastic else {"r": 4}
    peft_model = sqft.attach(model, sqft.SqftConfig(lora_alpha=8, **options))
    scheduler = sqft.RankScheduler()
    config = SFTConfig(output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=0.01,
                       report_to=[], logging_steps=1, max_length=64, bf16=False)  # fmt: skip
    data = Dataset.from_list([{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(32)])
    trainer = SFTTrainer(model=peft_model, args=config, train_dataset=data, processing_class=tokenizer,
                         callbacks=[scheduler] if elastic else [])  # fmt: skip
    trainer.train()
    assert len(scheduler.records) == (8 if elastic else 0)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    merged_zeros(peft_model)
    sqft.merge(peft_model)


def test_plain_peft_refuses_a_masked_adapter(sparse: Path, trained: Path) -> None:
    """In a process that never imported sqft; the error says what to do."""
    code = (
        "import sys, peft, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "peft.PeftModel.from_pretrained(model, sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sparse), str(trained)], capture_output=True, text=True)
    assert done.returncode != 0 and "load this folder with sqft.load" in done.stderr.splitlines()[-1]


def test_peft_loads_a_masked_adapter_once_sqft_has_been_used(trained: Path, tokens) -> None:
    ours, _ = sqft.load(trained)
    base, _ = sqft.load(sqft.folders.base_of(trained))
    theirs = PeftModel.from_pretrained(base, str(trained)).eval()
    assert all(isinstance(layer, SparseLoraLinear) for layer in adapter_layers(theirs).values())
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_plain_peft_loads_a_plain_lora(sparse: Path, trained_lora: Path, tokens) -> None:
    ours, _ = sqft.load(trained_lora)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sparse), str(trained_lora)).eval()
    assert not any(isinstance(layer, SparseLoraLinear) for layer in adapter_layers(theirs).values())
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_peft_api_disable_merge_unmerge(trained: Path, tokens) -> None:
    model, _ = sqft.load(trained)
    base, _ = sqft.load(sqft.folders.base_of(trained))
    with torch.no_grad():
        adapted, plain = model(tokens).logits, base(tokens).logits
        assert (adapted - plain).abs().max() > 0.01
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, plain)
        model.merge_adapter()
        assert torch.equal(model(tokens).logits, adapted)
        model.unmerge_adapter()
        torch.testing.assert_close(model(tokens).logits, adapted, rtol=1e-4, atol=1e-4)
        for layer in adapter_layers(model).values():
            assert int((layer.get_base_layer().weight == 0).sum()) >= layer.get_base_layer().weight.numel() // 2
        model.add_adapter(
            "second", sqft.SqftConfig(r=2, target_modules=sorted(model.peft_config["default"].target_modules))
        )
        model.set_adapter("second")
        torch.testing.assert_close(model(tokens).logits, plain, rtol=1e-3, atol=1e-3)


def test_merged_folder_is_an_ordinary_model(trained: Path, tokens, tmp_path: Path) -> None:
    sqft.merge(trained, out=tmp_path / "merged")
    adapted, _ = sqft.load(trained)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.equal(merged(tokens).logits, adapted(tokens).logits)


def test_compiled_model_gives_the_same(trained: Path, tokens) -> None:
    model, _ = sqft.load(trained)
    with torch.no_grad():
        plain = model(tokens).logits
        compiled = torch.compile(model, backend="aot_eager")(tokens).logits
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_bias": True}])
def test_lora_variants_that_do_not_mask_are_refused(option: dict) -> None:
    with pytest.raises(sqft.UsageError, match=next(iter(option))):
        sqft.SqftConfig(**option)
