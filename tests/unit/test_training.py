"""What training reports and leaves behind: precision, divergence, an interruption, the caller's model and tokenizer."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from pico import pico_model, pico_tokenizer
from safetensors.torch import load_file

import sqft
from sqft.outputs import SEAL
from sqft.training import loop
from sqft.training.callbacks import ProgressBar, last_checkpoint
from sqft.training.data import tokenize_all

OPTIONS = {"batch_size": 4, "r": 4, "lora_alpha": 8, "learning_rate": 0.02}


def adapted(folder: Path) -> tuple:
    model, tokenizer = sqft.load(folder)
    torch.manual_seed(0)
    return sqft.attach(model, sqft.SqftConfig(r=4, lora_alpha=8)), tokenizer


def test_bf16_training_of_a_float32_base_leaves_the_models_own_forward(sparse: Path, examples, tokens) -> None:
    """Accelerate's autocast would stay on: what is merged and scored would differ from the weights' own precision."""
    model, tokenizer = adapted(sparse)
    metrics = sqft.train(
        model, sqft.TrainConfig(max_steps=3, precision="bfloat16", **OPTIONS), examples, tokenizer=tokenizer
    )
    assert math.isfinite(metrics["loss"])
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & vars(model).keys()
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    sqft.train(model, sqft.TrainConfig(max_steps=1, precision="bfloat16", **OPTIONS), examples, tokenizer=tokenizer)
    sqft.merge(model)


def test_bf16_training_of_a_folder_merges(sparse: Path, examples, tmp_path: Path) -> None:
    config = sqft.TrainConfig(max_steps=3, precision="bfloat16", **OPTIONS)
    sqft.train(sparse, config, examples, out=tmp_path / "adapter")
    assert sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")["zeros_kept"] == 1.0


def test_attention_is_another_only_while_training(sparse: Path, examples) -> None:
    model, tokenizer = adapted(sparse)
    seen = set()
    layer = model.get_base_model().model.layers[0].self_attn
    layer.register_forward_hook(
        lambda module, *_: seen.add(module.config._attn_implementation) if module.training else None
    )
    before = model.config._attn_implementation
    sqft.train(model, sqft.TrainConfig(max_steps=1, attention="eager", **OPTIONS), examples, tokenizer=tokenizer)
    assert before == "sdpa" and seen == {"eager"} and model.config._attn_implementation == before


@pytest.mark.parametrize(("kind", "rate"), [("sparse-peft", 3e-4), ("lora", 3e-4), ("qa-sparse-peft", 1e-3)])
def test_the_default_learning_rate_is_the_kinds(kind: str, rate: float, examples, tokens) -> None:
    model, tokenizer = pico_model(), pico_tokenizer()
    sqft.sparsify(model, sqft.SparsifyConfig(), tokens)
    if kind == "qa-sparse-peft":
        sqft.quantize(model, sqft.QuantizeConfig(group_size=32), tokens)
    for given, expected in ((None, rate), (0.02, 0.02)):
        adapted = sqft.attach(copy.deepcopy(model), sqft.SqftConfig(r=4, kind=kind))
        config = sqft.TrainConfig(max_steps=1, batch_size=4, learning_rate=given)
        assert sqft.train(adapted, config, examples, tokenizer=tokenizer)["learning_rate"] == expected


def test_float16_training_on_a_cpu_says_what_to_take(sparse: Path, examples, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "pick_device", lambda name: torch.device("cpu"))
    with pytest.raises(sqft.UsageError, match="float16 needs an accelerator"):
        sqft.train(sparse, sqft.TrainConfig(precision="float16", **OPTIONS), examples, out=tmp_path / "out")


@pytest.mark.parametrize("logging_steps", [1, 50])
def test_a_training_that_diverges_is_an_error_and_keeps_its_checkpoints(
    logging_steps: int, sparse: Path, examples, tmp_path: Path, monkeypatch
) -> None:
    """transformers would leave NaN losses out of the mean and end well."""
    config = sqft.TrainConfig(max_steps=12, save_steps=3, logging_steps=logging_steps, **OPTIONS)
    step_end = ProgressBar.on_step_end

    def spoil(self, args, state, control, **kwargs) -> None:
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 4:
            next(p for p in kwargs["model"].parameters() if p.requires_grad).data.fill_(math.nan)

    monkeypatch.setattr(ProgressBar, "on_step_end", spoil)
    said = r"diverged: at step 5 the gradient is not finite; lower the learning rate \(it is 0.02\), .*kept.*/checkpoint-3\."
    for _ in range(2):  # the same options resume, and diverge again
        with pytest.raises(sqft.SqftError, match=said) as error:
            sqft.train(sparse, config, examples, out=tmp_path / "out")
        assert "bfloat16" not in str(error.value) and "learn_scales" not in str(error.value)
    assert not (tmp_path / "out").exists()
    (work,) = tmp_path.glob(".out.training-*")
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-3"]
    adapter, _ = sqft.load(work / "checkpoint-3")
    assert all(p.isfinite().all() for p in adapter.parameters())
    monkeypatch.setattr(ProgressBar, "on_step_end", step_end)
    lower = sqft.TrainConfig(**{**vars(config), "learning_rate": 0.01})
    assert sqft.train(sparse, lower, examples, out=tmp_path / "out")["steps"] == 12 and not work.exists()


def test_the_weights_are_those_of_before_the_step_that_diverges(sparse: Path, examples, monkeypatch) -> None:
    """And what to try names the precision and the scales, where they are not the safest."""
    model, tokenizer = adapted(sparse)
    loss_of = loop.SqftTrainer.compute_loss

    def spoil(self, *args, **kwargs):
        return loss_of(self, *args, **kwargs) * (math.nan if self.state.global_step == 2 else 1)

    monkeypatch.setattr(loop.SqftTrainer, "compute_loss", spoil)
    config = sqft.TrainConfig(max_steps=6, precision="bfloat16", logging_steps=50, **OPTIONS)
    with pytest.raises(
        sqft.SqftError, match=r"at step 3 .*train in float32 \(it is bfloat16\). Nothing was written. Other"
    ):
        sqft.train(model, config, examples, tokenizer=tokenizer)
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_adapter_that_is_not_finite_is_never_written(sparse: Path, tmp_path: Path) -> None:
    model, tokenizer = adapted(sparse)
    next(iter(sqft.Elastic(model).layers.values())).lora_B["default"].weight.data[0, 0] = math.inf
    with pytest.raises(sqft.SqftError, match=r"not finite \(.*lora_B"):
        sqft.save(model, tokenizer, tmp_path / "adapter", parent=sparse)
    assert not (tmp_path / "adapter").exists()


def test_a_learning_rate_without_sense_diverges(sparse: Path, examples) -> None:
    model, tokenizer = adapted(sparse)
    config = sqft.TrainConfig(max_steps=6, **OPTIONS)
    object.__setattr__(config, "learning_rate", 1e30)  # the option ends at 10
    with pytest.raises(sqft.SqftError, match="diverged"):
        sqft.train(model, config, examples, tokenizer=tokenizer)


@pytest.mark.parametrize(("stop", "max_steps"), [("step 8", 9), ("evaluation 3", -1), ("end", 9), ("end", -1)])
def test_a_resumed_run_reports_what_a_straight_one_does(
    stop: str, max_steps: int, sparse: Path, examples, tmp_path: Path, monkeypatch
) -> None:
    """Loss, evaluation loss, log and weights, wherever it was stopped: between two log entries, in the evaluation after
    an epoch's last step, or when all was trained and nothing written yet."""
    config = sqft.TrainConfig(max_steps=max_steps, epochs=2, save_steps=5, logging_steps=4, lora_dropout=0.1, **OPTIONS)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": e.prompt + e.completion}) + "\n" for e in examples[:18]))
    config = sqft.TrainConfig(**{**vars(config), "data": str(data), "eval_data": str(data)})
    straight = sqft.train(sparse, config, out=tmp_path / "straight")
    with monkeypatch.context() as patch:
        if stop == "end":
            patch.setattr(loop, "_write_logs", interrupt)
        elif stop.startswith("step"):
            patch.setattr(ProgressBar, "on_step_end", at(int(stop[-1]), ProgressBar.on_step_end))
        else:
            patch.setattr(loop.Trainer, "evaluate", at(2, loop.Trainer.evaluate))
        with pytest.raises(KeyboardInterrupt):
            sqft.train(sparse, config, out=tmp_path / "resumed")
    assert list(tmp_path.glob(".resumed.training-*/checkpoint-*")) and not (tmp_path / "resumed").exists()
    resumed = sqft.train(sparse, config, out=tmp_path / "resumed")
    for name in ("loss", "eval_loss", "steps"):
        assert straight[name] == resumed[name], name
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("straight", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "resumed")
    losses = [entry["loss"] for entry in log_of(tmp_path / "straight") if "loss" in entry]
    assert min(losses) <= straight["loss"] <= max(losses)


@pytest.mark.parametrize("damage", ["flip", "cut", "unfinished", "seal", "all"])
def test_a_resumed_run_takes_the_newest_whole_checkpoint(damage: str, sparse: Path, examples, tmp_path: Path, monkeypatch,
                                                         capsys) -> None:  # fmt: skip
    """Never one that is damaged or was not finished, and of a damaged one it is said."""
    config = sqft.TrainConfig(max_steps=7, save_steps=2, **OPTIONS)
    straight = sqft.train(sparse, config, examples, out=tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_write_logs", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sqft.train(sparse, config, examples, out=tmp_path / "resumed")
    (work,) = tmp_path.glob(".resumed.training-*")
    older, newest = sorted(work.glob("checkpoint-*"))
    assert (last_checkpoint(work), older.name, newest.name) == (newest, "checkpoint-6", "checkpoint-7")
    for file in (newest / "optimizer.pt", *([older / "adapter_model.safetensors"] if damage == "all" else [])):
        data = bytearray(file.read_bytes())
        if damage in ("flip", "all"):
            data[-1] ^= 1
        file.write_bytes(data[:-1] if damage == "cut" else data)
    if damage in ("unfinished", "seal"):
        (newest / SEAL).write_text("{") if damage == "seal" else (newest / SEAL).unlink()
    capsys.readouterr()
    assert last_checkpoint(work) == (None if damage == "all" else older)
    said = capsys.readouterr().err
    assert said.count("is damaged") == {"unfinished": 0, "all": 2}.get(damage, 1), said
    resumed = sqft.train(sparse, config, examples, out=tmp_path / "resumed")
    assert {k: straight[k] for k in ("loss", "steps")} == {k: resumed[k] for k in ("loss", "steps")}
    for file in ("adapter_model.safetensors", "adapter_config.json", "training_log.jsonl"):
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()


def interrupt(*args, **kwargs) -> None:
    raise KeyboardInterrupt


def at(count: int, original):
    calls = []

    def counted(*args, **kwargs):
        calls.append(count)
        return original(*args, **kwargs) if len(calls) < count else interrupt()

    return counted


def log_of(folder: Path) -> list[dict]:
    """Without what is about time."""
    lines = map(json.loads, (folder / "training_log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k in ("loss", "eval_loss", "step", "learning_rate")} for line in lines]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_callers_tokenizer_stays_as_it_is(side: str, sparse: Path, examples, tmp_path: Path) -> None:
    """Also in what is written: neither the side of padding nor padding itself."""
    model, tokenizer = adapted(sparse)
    tokenizer.padding_side = side
    tokenizer.save_pretrained(tmp_path / "before")
    sqft.train(model, sqft.TrainConfig(max_steps=1, **OPTIONS), examples, tokenizer=tokenizer)
    task = sqft.EvaluateConfig(task="arithmetic", limit=2, text="builtin", length=32, max_tokens=64)
    sqft.evaluate(model, task, tokenizer=tokenizer)
    assert tokenizer.padding_side == side
    tokenizer.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes(), file.name


def test_a_row_whose_only_label_is_never_predicted_is_left_out(sparse: Path) -> None:
    """Alone in a batch of an evaluation, its loss would be the mean of nothing: NaN."""
    _, tokenizer = sqft.load(sparse)
    config = sqft.TrainConfig(max_length=4, packing=True, completion_only=False)
    rows = tokenize_all([sqft.Example("a", "b")] * 3, tokenizer, config)  # nine tokens
    assert [len(row["input_ids"]) for row in rows] == [4, 4]
