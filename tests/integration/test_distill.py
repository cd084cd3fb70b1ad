"""Learning from a teacher: ``sqft.train``, Trainer and TRL alike; what a step's loss is; a cached teacher; small ranks."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from pico import FAMILIES, pico_folder, pico_model, pico_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed

import sqft
from sqft.config import TrainConfig
from sqft.training import teachers
from sqft.training.callbacks import ProgressBar
from sqft.training.data import collate, tokenize
from sqft.training.distillation import divergence
from sqft.training.parts import Parts
from sqft.training.teachers import CachedTeacher, Teacher

BATCH, RATE, SEED = 4, 0.02, 42
WEIGHTS = {"distill_loss": 0.5, "distill_logits": 2.0, "distill_blocks": 0.3, "distill_temperature": 1.5}
ADAPTERS: dict[str, dict[str, Any]] = {
    "fixed": {"r": 4}, "dropout": {"r": 4, "lora_dropout": 0.2}, "ranks": {"search_space": [6, 4, 2]},
    "packed": {"r": 4},
}  # fmt: skip
TERMS = ("loss", "labels_loss", "logits_loss", "blocks_loss", "ranks_loss", "grad_norm")


class MyTrainer(sqft.Distill, Trainer):
    pass


@pytest.fixture(scope="module")
def teacher(dense: Path, uneven: list[sqft.Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense + LoRA, tuned."""
    out = tmp_path_factory.mktemp("teacher") / "adapter"
    set_seed(0)
    base, tokenizer = sqft.load(dense)
    model = sqft.attach(base, sqft.SqftConfig(kind="lora", r=4, lora_alpha=8))
    sqft.train(model, TrainConfig(max_steps=8, batch_size=8, learning_rate=0.02), uneven, tokenizer=tokenizer)
    sqft.save(model, tokenizer, out, parent=dense)
    return out


@pytest.fixture(scope="module")
def packed(sparse: Path, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    sqft.quantize(sparse, sqft.QuantizeConfig(group_size=32), tokens, out=out)
    return out


@pytest.fixture(scope="module")
def uneven() -> list[sqft.Example]:
    return [sqft.Example(f"Q: {'so ' * (i % 5)}{i} plus {i}?\nA:", f" {2 * i}{' indeed' * (i % 3)}") for i in range(24)]


def options(adapter: str, **others: Any) -> TrainConfig:
    elastic = {"rank_strategy": "sandwich", "distill_ranks": True} if adapter == "ranks" else {}
    values = {
        "adapter": "qa-sparse-peft" if adapter == "packed" else "sparse-peft", "lora_alpha": 8, **ADAPTERS[adapter],
        "max_steps": 4, "batch_size": BATCH, "learning_rate": RATE, "seed": SEED, "logging_steps": 1,
        "warmup_steps": 0, "group_by_length": False, **WEIGHTS, **elastic,
    }  # fmt: skip
    return TrainConfig(**{**values, **others})


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "training_log.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def numbers(log: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([[entry[name] for name in TERMS if name in entry] for entry in log if "loss" in entry])


def fresh(source: Path, adapter: str) -> tuple[Any, Any, dict[str, Any]]:
    model, tokenizer = sqft.load(source)
    set_seed(SEED)
    config = sqft.SqftConfig(lora_alpha=8, quantization_aware=adapter == "packed", **ADAPTERS[adapter])
    given: dict[str, Any] = dict(WEIGHTS)
    if adapter == "ranks":
        given |= {"callbacks": [sqft.RankScheduler("sandwich", seed=SEED)], "distill_ranks": True}
    return sqft.attach(model, config), tokenizer, given


def arguments_of(out: Path, accumulation: int) -> dict[str, Any]:
    return {
        "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": BATCH, "learning_rate": RATE, "seed": SEED,
        "lr_scheduler_type": "cosine", "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "gradient_accumulation_steps": accumulation,
    }  # fmt: skip


def rows_of(tokenizer: Any, examples: list[sqft.Example]) -> list[dict[str, list[int]]]:
    return [tokenize(example, tokenizer) for example in examples]


def plain(source: Path, adapter: str, teacher: Path, examples: list[sqft.Example], out: Path, accumulation: int) -> Any:
    model, tokenizer, given = fresh(source, adapter)
    trainer = MyTrainer(
        model=model, args=TrainingArguments(remove_unused_columns=False, **arguments_of(out, accumulation)),
        train_dataset=rows_of(tokenizer, examples), data_collator=partial(collate, fill=0),
        teacher=sqft.load(teacher)[0], **given,
    )  # fmt: skip
    trainer.train()
    return numbers(trainer.state.log_history)


def trl(source: Path, adapter: str, teacher: Path, examples: list[sqft.Example], out: Path, accumulation: int) -> Any:
    from trl import SFTConfig, SFTTrainer

    class MySFTTrainer(sqft.Distill, SFTTrainer):
        pass

    model, tokenizer, given = fresh(source, adapter)
    data = Dataset.from_list([{"prompt": e.prompt, "completion": e.completion} for e in examples])
    arguments = SFTConfig(completion_only_loss=True, bf16=False, **arguments_of(out, accumulation))
    trainer = MySFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer,
                           teacher=sqft.load(teacher)[0], **given)  # fmt: skip
    trainer.train()
    return numbers(trainer.state.log_history)


@pytest.mark.parametrize(("adapter", "accumulation"), [("fixed", 2), ("dropout", 1), ("ranks", 2), ("packed", 1)])
def test_the_same_losses(adapter: str, accumulation: int, sparse: Path, packed: Path, teacher: Path,
                         uneven: list[sqft.Example], tmp_path: Path) -> None:  # fmt: skip
    source = packed if adapter == "packed" else sparse
    config = options(adapter, distill=str(teacher), gradient_accumulation=accumulation)
    metrics = sqft.train(source, config, uneven, out=tmp_path / "ours")
    mine = numbers(log_of(tmp_path / "ours"))
    assert mine.shape == (4, 6 if adapter == "ranks" else 5) and mine[-1, 0] < mine[0, 0]
    names = [name for name in TERMS if name in metrics]
    torch.testing.assert_close(mine[:, : len(names)].mean(0), torch.tensor([metrics[name] for name in names]))
    if adapter != "ranks":
        total = 0.5 * mine[:, 1] + 2.0 * mine[:, 2] + 0.3 * mine[:, 3]
        torch.testing.assert_close(mine[:, 0], total, rtol=1e-5, atol=1e-5)
    theirs = [plain(source, adapter, teacher, uneven, tmp_path / "plain", accumulation)]
    if sys.version_info >= (3, 11):  # which TRL needs
        theirs.append(trl(source, adapter, teacher, uneven, tmp_path / "trl", accumulation))
    for other in theirs:
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-6)


def naive(model: Any, teacher: Any, rows: list[Any], temperature: float) -> dict[str, float]:
    """Each term by loops over sequences and tokens, in float64."""
    kl, errors, labels = [], [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        seen = []
        for one in (model, teacher):
            with torch.no_grad(), Parts(one).observed(blocks=True) as out:
                one(input_ids=ids)
            seen.append(out)
        for t in range(ids.shape[1]):
            for ours, its in zip(seen[0].blocks, seen[1].blocks, strict=True):
                h, g = ours[0, t].double(), its[0, t].double()
                errors.append(float((h - g).square().sum() / g.square().sum()))
            if t + 1 < ids.shape[1]:
                log_s, log_t = ((out.logits[0, t].double() / temperature).log_softmax(-1) for out in seen)
                kl.append(temperature**2 * float((log_t.exp() * (log_t - log_s)).sum()))
                if row["labels"][t + 1] != -100:
                    labels.append(-float(seen[0].logits[0, t].double().log_softmax(-1)[row["labels"][t + 1]]))
    return {"labels_loss": sum(labels) / len(labels), "logits_loss": sum(kl) / len(kl),
            "blocks_loss": sum(errors) / len(errors)}  # fmt: skip


@pytest.mark.parametrize(("batch", "checkpointing"), [(8, False), (2, True)])
def test_a_steps_terms(
    batch: int, checkpointing: bool, sparse: Path, teacher: Path, uneven: list[sqft.Example]
) -> None:
    """Means over the tokens of the whole step, without padding, however it is accumulated; evaluation has labels only."""
    model, tokenizer = sqft.load(sparse)
    torch.manual_seed(0)
    adapted = sqft.attach(model, sqft.SqftConfig(r=4, lora_alpha=8))
    for layer in sqft.Elastic(adapted).layers.values():
        layer.lora_B["default"].weight.data.normal_(std=0.05)
    examples = uneven[:8]
    rows = rows_of(tokenizer, examples)
    expected = naive(adapted, sqft.load(teacher)[0], rows, 1.5)
    config = TrainConfig(max_steps=1, batch_size=batch, gradient_accumulation=8 // batch, learning_rate=1e-9,
                         gradient_checkpointing=checkpointing, logging_steps=1, distill=str(teacher), **WEIGHTS)  # fmt: skip
    metrics = sqft.train(adapted, config, examples, tokenizer=tokenizer, eval_data=examples)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name
    total = 0.5 * expected["labels_loss"] + 2 * expected["logits_loss"] + 0.3 * expected["blocks_loss"]
    assert metrics["loss"] == pytest.approx(total, rel=1e-4)
    # a mean over evaluation batches
    assert metrics["eval_loss"] == pytest.approx(expected["labels_loss"], rel=0.2 if batch == 2 else 1e-4)


def test_checkpointing_and_accumulation_give_the_same_gradients(sparse: Path, teacher: Path, uneven: list[sqft.Example],
                                                                tmp_path: Path) -> None:  # fmt: skip
    found = []
    for i, changed in enumerate([{}, {"gradient_checkpointing": True}, {"batch_size": 2, "gradient_accumulation": 2}]):
        for adapter in ("fixed", "ranks"):
            config = options(adapter, distill=str(teacher), **changed)
            sqft.train(sparse, config, uneven, out=tmp_path / f"{adapter}{i}")
            found.append(numbers(log_of(tmp_path / f"{adapter}{i}")))
    for i in (2, 3, 4, 5):
        torch.testing.assert_close(found[i], found[i % 2], rtol=1e-4, atol=1e-5)


def test_bfloat16(sparse: Path, teacher: Path, uneven: list[sqft.Example], tmp_path: Path) -> None:
    whole = sqft.train(sparse, options("fixed", distill=str(teacher)), uneven, out=tmp_path / "whole")
    half = sqft.train(
        sparse, options("fixed", distill=str(teacher), precision="bfloat16"), uneven, out=tmp_path / "half"
    )
    for name in ("labels_loss", "logits_loss", "blocks_loss"):
        assert half[name] == pytest.approx(whole[name], rel=0.05) and half[name] != whole[name]
    assert sqft.merge(tmp_path / "half", out=tmp_path / "merged")["zeros_kept"] == 1.0


def cached(teacher: Path, **others: Any) -> TrainConfig:
    return options("fixed", distill=str(teacher), **{"distill_blocks": None, "distill_cache": 259, **others})


@pytest.mark.parametrize("group_by_length", [False, True])
def test_a_cached_teacher_is_the_teacher(group_by_length: bool, sparse: Path, teacher: Path, uneven: list[sqft.Example],
                                         tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Rows are told apart in any order, in every epoch; what is rounded is float16's."""
    changed = {"group_by_length": group_by_length, "max_steps": 10, "batch_size": 5}
    whole = options("fixed", distill=str(teacher), **{**changed, "distill_blocks": 0.0})
    sqft.train(sparse, whole, uneven, out=tmp_path / "live")
    sqft.train(sparse, cached(teacher, **changed), uneven, out=tmp_path / "cached")
    one, two = (numbers(log_of(tmp_path / name)) for name in ("live", "cached"))
    torch.testing.assert_close(one[:, :3], two[:, :3], rtol=1e-2, atol=1e-4)
    few = sqft.train(sparse, cached(teacher, distill_cache=4, **changed), uneven, out=tmp_path / "few")
    assert 0 < few["logits_loss"] < float(one[:, 2].mean())
    target = CachedTeacher.target  # and of other rows it would say something else
    monkeypatch.setattr(
        CachedTeacher, "target", lambda self, inputs, t: target(self, {**inputs, "index": inputs["index"] * 0}, t)
    )
    sqft.train(sparse, cached(teacher, **{**changed, "limit": 24}), uneven, out=tmp_path / "other")
    assert log_of(tmp_path / "other")[0]["logits_loss"] > 1.5 * float(one[0, 2])


def test_a_cache_is_computed_once_and_resumed(sparse: Path, teacher: Path, uneven: list[sqft.Example], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    config = cached(teacher, max_steps=9, save_steps=3, distill_cache=16, logging_steps=2)
    straight = sqft.train(sparse, config, uneven, out=tmp_path / "straight")
    looks: list[int] = []
    says, step_end = teachers.teacher_says, ProgressBar.on_step_end

    def counted(*args: Any) -> Any:
        looks.append(1)
        return says(*args)

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(teachers, "teacher_says", counted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ProgressBar, "on_step_end", interrupt)
        sqft.train(sparse, config, uneven, out=tmp_path / "resumed")
    (work,) = tmp_path.glob(".resumed.training-*")
    stored = load_file(work / "teacher" / "said.safetensors")
    assert len(looks) == 6 and stored["values"].dtype == torch.float16 and stored["values"].shape[1] == 16
    assert stored["starts"].shape == (25,) and int(stored["starts"][-1]) == len(stored["indices"])
    resumed = sqft.train(sparse, config, uneven, out=tmp_path / "resumed")
    assert len(looks) == 6 and not work.exists()
    for name in ("loss", "labels_loss", "logits_loss"):
        assert straight[name] == pytest.approx(resumed[name], rel=1e-6), name
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("straight", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_small_ranks_learn_from_the_largest(sparse: Path, uneven: list[sqft.Example], tmp_path: Path) -> None:
    """A step's gradient is that of the largest by labels, and of the others by the largest's predictions, which are
    constants; every sub-adapter's loss is recorded."""
    model, tokenizer, given = fresh(sparse, "ranks")
    elastic = sqft.Elastic(model)
    for layer in elastic.layers.values():
        layer.lora_B["default"].weight.data.normal_(std=0.3)
    rows = rows_of(tokenizer, uneven[:4])
    batch = collate(rows, 0)
    counted = batch["attention_mask"][:, 1:].bool()
    scheduler = given["callbacks"][0]
    scheduler._elastic = elastic
    small, drawn = scheduler.smaller(0)
    assert small == {g.name: 2 for g in elastic.groups} and small != drawn and scheduler.smaller(1)[1] != drawn
    model.train()
    out = model(**batch)
    out.loss.backward()
    said, losses = out.logits.detach()[:, :-1][counted], [float(out.loss.detach())]
    for ranks in (small, drawn):
        with elastic.at(ranks):
            out = model(**batch)
            kl = torch.nn.functional.kl_div(
                out.logits[:, :-1][counted].log_softmax(-1), said.softmax(-1), reduction="batchmean"
            )
            kl.backward()
            losses.append(float(out.loss.detach()))
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found: dict[str, torch.Tensor] = {}

    class Looking(MyTrainer):
        def training_step(self, model: Any, *args: Any) -> Any:
            loss = super().training_step(model, *args)
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            return loss

    given = {"callbacks": [scheduler], "distill_ranks": True}
    arguments = {**arguments_of(tmp_path, 1), "max_steps": 1}
    trainer = Looking(model=model, args=TrainingArguments(remove_unused_columns=False, **arguments), train_dataset=rows,
                      data_collator=partial(collate, fill=0), **given)  # fmt: skip
    trainer.train()
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    choices, recorded = zip(*scheduler.records, strict=True)
    assert recorded == pytest.approx(losses, rel=1e-5)
    sizes = [elastic.space.encode(ranks) for ranks in ({g.name: 6 for g in elastic.groups}, small, drawn)]
    assert list(map(tuple, choices)) == sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_all_families(family: str) -> None:
    options = {"final_logit_softcapping": 0.5} if family == "gemma2" else {}
    model = pico_model(family, **options)
    parts = Parts(model)
    ids = torch.arange(6).view(2, 3)
    with torch.no_grad(), parts.observed(blocks=True) as seen:
        model(ids)
    assert seen.hidden is not None and seen.logits is not None and len(seen.blocks) == len(parts.blocks) == 2
    torch.testing.assert_close(parts.head(seen.hidden), seen.logits, rtol=1e-4, atol=1e-5)
    said = Teacher(model)
    looked = said.look({"input_ids": ids, "labels": ids}, True, torch.no_grad)
    at = torch.tensor([1, 4])
    kl, gradient = said.target(looked, 1.0, torch.no_grad)(torch.zeros(2, parts.causal.config.vocab_size), at)
    exact = divergence(torch.zeros_like(gradient), seen.logits.flatten(0, 1)[at])
    torch.testing.assert_close((kl, gradient), exact, rtol=1e-4, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_blocks_of_several_streams_are_compared_token_by_token() -> None:
    """AltUp's, one beside the other."""
    model, ids = pico_model("gemma3n_text"), torch.arange(6).view(2, 3)
    parts = Parts(model)
    states: list[Tensor] = []
    parts.blocks[0].register_forward_hook(lambda module, arguments, out: states.append(out))
    with torch.no_grad(), parts.observed(blocks=True) as seen:
        model(ids)
    assert states[0].shape == (2, 2, 3, 64) and seen.blocks[0].shape == (2, 3, 128)
    assert torch.equal(seen.blocks[0][1, 2], torch.cat([states[0][0, 1, 2], states[0][1, 1, 2]]))


def test_teachers_that_do_not_fit(sparse: Path, dense: Path, uneven: list[sqft.Example], tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    pico_model(num_hidden_layers=3).save_pretrained(deep)
    pico_tokenizer().save_pretrained(deep)
    with pytest.raises(sqft.UsageError, match=r"3 blocks of width 32, the model 2 of 32.*set distill_blocks to 0"):
        sqft.train(sparse, options("fixed", distill=str(deep)), uneven, out=tmp_path / "out")
    metrics = sqft.train(sparse, options("fixed", distill=str(deep), distill_blocks=0.0), uneven, out=tmp_path / "out")
    assert metrics["logits_loss"] > 0 and "blocks_loss" not in metrics
    other = pico_folder(tmp_path / "other")
    tokenizer = pico_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(other)
    with pytest.raises(sqft.UsageError, match="another vocabulary"):
        sqft.train(sparse, options("fixed", distill=str(other)), uneven, out=tmp_path / "out2")
    with pytest.raises(sqft.UsageError, match="needs the teacher itself"):
        cached(dense, distill_blocks=1.0)
    with pytest.raises(sqft.UsageError, match="rank_strategy sandwich"):
        options("fixed", distill_ranks=True)
    with pytest.raises(sqft.UsageError, match="one of them has to be more"):
        options("fixed", distill_loss=0.0, distill_logits=0.0, distill_blocks=0.0)
    model, _, _ = fresh(sparse, "ranks")
    arguments = TrainingArguments(**arguments_of(tmp_path, 1))
    with pytest.raises(sqft.UsageError, match=r"RankScheduler\('sandwich'\)"):
        MyTrainer(model=model, args=arguments, distill_ranks=True)
    with pytest.raises(sqft.UsageError, match="set distill_blocks to 0"):
        empty = {"values": torch.empty(0, 1), "indices": torch.empty(0, 1), "starts": torch.zeros(1)}
        MyTrainer(model=model, args=arguments, teacher=CachedTeacher(empty))


def test_a_teacher_named_in_a_recipe_is_the_recipes_model(dense: Path, tmp_path: Path) -> None:
    from sqft.recipe import load_recipe, steps

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {dense}\noutput: out\nsparsify: {{}}\ntrain: {{task: arithmetic, distill: model}}\n")
    assert steps(load_recipe(recipe))[1].config.distill == str(dense)
