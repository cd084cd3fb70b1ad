"""``sqft.train``, transformers' Trainer and TRL's SFTTrainer train alike: the same losses for the same seed and data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from pico import pico_model, pico_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

import sqft
from sqft.config import TrainConfig
from sqft.training.data import tokenize

STEPS, BATCH, RATE, SEED = 6, 4, 0.02, 42
QUANTIZED = "quantization-aware"
ADAPTERS: dict[str, dict[str, Any]] = {
    "fixed": {"r": 4}, "elastic": {"search_space": [6, 4, 2]}, "dropout": {"r": 4, "lora_dropout": 0.2},
    QUANTIZED: {"r": 4}, f"{QUANTIZED}, elastic": {"search_space": [6, 4, 2]},
}  # fmt: skip
# What is given to Trainer and SFTTrainer alike, and to sqft.train by its own names.
ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": RATE, "lr_scheduler_type": "cosine",
    "seed": SEED, "logging_steps": 1, "report_to": [], "save_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(sparse: Path, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    sqft.quantize(sparse, sqft.QuantizeConfig(group_size=32), tokens, out=out)
    return out


@pytest.fixture(scope="module")
def uneven() -> list[sqft.Example]:
    """Examples of uneven length, so that a step's mean over tokens differs from one over sequences."""
    return [sqft.Example(f"Q: {'so ' * (i % 5)}{i} plus {i}?\nA:", f" {2 * i}{' indeed' * (i % 3)}") for i in range(40)]


def steps_of(log: list[dict[str, Any]]) -> torch.Tensor:
    """Loss and gradient norm of every step."""
    return torch.tensor([(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry])


def ours(source: Path, adapter: str, examples: list[sqft.Example], out: Path, accumulation: int) -> torch.Tensor:
    """``sqft train`` of a folder. By default it batches by length and warms up."""
    config = TrainConfig(
        adapter="qa-sparse-peft" if QUANTIZED in adapter else "sparse-peft", lora_alpha=8, **ADAPTERS[adapter],
        max_steps=STEPS, batch_size=BATCH, gradient_accumulation=accumulation, learning_rate=RATE, seed=SEED,
        logging_steps=1, warmup_steps=0, group_by_length=False,
    )  # fmt: skip
    sqft.train(source, config, examples, out=out)
    return steps_of([json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()])


def fresh(source: Path, adapter: str) -> tuple[Any, Any, list[Any]]:
    model, tokenizer = sqft.load(source)
    set_seed(SEED)
    config = sqft.SqftConfig(lora_alpha=8, quantization_aware=QUANTIZED in adapter, **ADAPTERS[adapter])
    elastic = "search_space" in ADAPTERS[adapter]
    return sqft.attach(model, config), tokenizer, [sqft.RankScheduler(seed=SEED)] if elastic else []


def plain(source: Path, adapter: str, examples: list[sqft.Example], out: Path, accumulation: int) -> torch.Tensor:
    model, tokenizer, callbacks = fresh(source, adapter)
    rows = []
    for example in examples:
        prompt, completion = tokenizer(example.prompt)["input_ids"], tokenizer(example.completion)["input_ids"]
        completion = [*completion, tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    arguments = TrainingArguments(str(out), gradient_accumulation_steps=accumulation, remove_unused_columns=False,
                                  **ARGUMENTS)  # fmt: skip
    trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), rows, callbacks=callbacks)
    trainer.train()
    return steps_of(trainer.state.log_history)


def trl(source: Path, adapter: str, examples: list[sqft.Example], out: Path, accumulation: int) -> torch.Tensor:
    from trl import SFTConfig, SFTTrainer

    model, tokenizer, callbacks = fresh(source, adapter)
    data = Dataset.from_list([{"prompt": e.prompt, "completion": e.completion} for e in examples])
    arguments = SFTConfig(str(out), gradient_accumulation_steps=accumulation, completion_only_loss=True, bf16=False,
                          **ARGUMENTS)  # fmt: skip
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)
    trainer.train()
    return steps_of(trainer.state.log_history)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_same_losses(adapter: str, accumulation: int, sparse: Path, packed: Path, uneven: list[sqft.Example],
                         tmp_path: Path) -> None:  # fmt: skip
    source = packed if QUANTIZED in adapter else sparse
    mine = ours(source, adapter, uneven, tmp_path / "ours", accumulation)
    assert len(mine) == STEPS and mine[-1, 0] < mine[0, 0]
    theirs = [plain(source, adapter, uneven, tmp_path / "plain", accumulation)]
    if sys.version_info >= (3, 11):  # which TRL needs
        theirs.append(trl(source, adapter, uneven, tmp_path / "trl", accumulation))
    for other in theirs:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_what_is_set_apart_is_seen(sparse: Path, uneven: list[sqft.Example], tmp_path: Path) -> None:
    """The comparison can fail: other completions, another seed, another normalisation of the loss."""
    mine = ours(sparse, "fixed", uneven, tmp_path / "ours", 1)
    other = [sqft.Example(example.prompt, example.completion + ".") for example in uneven]
    assert (mine - plain(sparse, "fixed", other, tmp_path / "plain", 1)).abs().max() > 1e-3
    assert (mine[:3] - ours(sparse, "fixed", uneven, tmp_path / "two", 2)[:3]).abs().max() > 1e-3


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Like Mistral's and Phi-3's: a space is put before every text, and two of them are a token of their own."""
    letters = [chr(c) for c in range(33, 127)] + ["\n", "▁"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{letter: i + 3 for i, letter in enumerate(letters)}}
    for merged in ("▁▁", "▁4"):
        vocabulary[merged] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "▁"), ("▁", "4")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   pad_token="</s>")  # fmt: skip


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
@pytest.mark.parametrize("tokenizer", [pico_tokenizer(), spaced_tokenizer()], ids=["byte-level", "spaced"])
def test_the_same_tokens_as_trl(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A completion begins with the token that generation has to give after the prompt."""
    from trl import SFTConfig, SFTTrainer

    example = sqft.Example("Q: 2 plus 2?\nA:", " 42")
    row = tokenize(example, tokenizer)
    together = tokenizer(example.prompt + example.completion)["input_ids"]
    assert row["input_ids"] == [*together, tokenizer.eos_token_id]
    kept = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(kept[:-1]) == " 42" and kept[-1] == tokenizer.eos_token_id
    data = Dataset.from_list([{"prompt": example.prompt, "completion": example.completion}])
    arguments = SFTConfig(str(tmp_path), completion_only_loss=True, bf16=False, report_to=[])
    theirs = SFTTrainer(pico_model(), args=arguments, train_dataset=data, processing_class=tokenizer).train_dataset[0]
    assert row == {key: list(theirs[key]) for key in ("input_ids", "labels")}
