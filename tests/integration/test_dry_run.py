"""``sqft run --dry-run``: what it says is what the run then does; it loads and writes nothing."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from pico import pico_model, pico_tokenizer
from test_cli import call, fails, snapshot
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import sqft
from sqft.measuring.size import weight_bytes
from sqft.measuring.speed import Speed
from sqft.models.dense import skeleton
from sqft.models.discover import describe
from sqft.planning import estimate
from sqft.planning.estimate import Cost, Shape, batches, forward, shape_of
from sqft.planning.walk import Walk
from sqft.planning.workload import Problems, counted

SMALL = "{samples: 4, length: 32}"
FULL_SIZE = {  # sizes of the models that the shipped recipes are for, and the parameters that their cards state
    "llama-3-8b-gsm8k": ("llama", 8_030_261_248, {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
                                                  "num_hidden_layers": 32, "num_key_value_heads": 8}),
    "mistral-7b-v0.3-gsm8k": ("mistral", 7_248_023_552, {"hidden_size": 4096, "intermediate_size": 14336,
                                                         "vocab_size": 32768, "num_key_value_heads": 8}),
    "phi-3-mini-gsm8k": ("phi3", 3_821_079_552, {}),
}  # fmt: skip


def text_of(model: object, output: object, train: str = "", **stages: str) -> str:
    options = {"sparsify": SMALL, "quantize": "{samples: 4, length: 32, group_size: 32, format: gptq_v2}",
               "train": "{adapter: qa-sparse-peft, base: sparsify, task: arithmetic, limit: 16, eval_limit: 4, "
               f"max_steps: 4, batch_size: 4, save_steps: 2, search_space: [4, 2]{train}}}",
               "search": "{task: arithmetic, limit: 4, metric: loss, evaluations: 3}", "merge": "{}",
               "evaluate": "{task: arithmetic, limit: 4}", **stages}  # fmt: skip
    lines = [f"{name}: {value}" for name, value in options.items() if value]
    return "\n".join([f"model: {model}", f"output: {output}", *lines, ""])


def planned(capsys, *arguments: object) -> dict:
    code, out, err = call(capsys, "run", *arguments, "--dry-run", "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.slow
def test_it_says_what_the_run_does(dense: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(text_of(dense, run))
    before = snapshot(tmp_path)
    plan = planned(capsys, recipe)
    assert snapshot(tmp_path) == before and not run.exists()
    assert [step["name"] for step in plan["steps"]] == [
        "sparsify", "quantize", "train", "search", "merge", "evaluate/model", "evaluate/sparsify", "evaluate/quantize",
        "evaluate/merge"]  # fmt: skip
    assert {step["state"] for step in plan["steps"]} == {"run"}
    assert plan["parameters"] == sum(p.numel() for p in pico_model().parameters())
    assert plan["seconds"] == pytest.approx(sum(step["seconds"] for step in plan["steps"]))
    assert plan["steps"][2]["parent"] == str(run / "quantize")
    assert plan["steps"][0]["options"] == {"samples": 4, "length": 32}  # what is not the default
    code, out, _ = call(capsys, "run", recipe, "--dry-run")
    assert code == 0 and "within a factor of" in out and "search_space=[4, 2]" in out

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sqft.training.loop.write_probe", interrupt)  # trained, not yet written
    assert call(capsys, "run", recipe)[0] == 1
    plan = planned(capsys, recipe)
    assert [step["state"] for step in plan["steps"][:4]] == ["skip", "skip", "resume", "run"]
    assert plan["steps"][2]["note"] == "from step 4"
    monkeypatch.undo()
    assert call(capsys, "run", recipe)[0] == 0
    for step in plan["steps"][2:5]:
        real = weight_bytes(Path(step["output"]))
        assert real == pytest.approx(step["disk_bytes"], rel=0.25), step["name"]  # pico folders are headers for a part
    before = snapshot(run)
    plan = planned(capsys, recipe)
    assert {step["state"] for step in plan["steps"]} == {"skip"} and plan["seconds"] == 0
    # An option of the search: it, what comes after it, and nothing else.
    recipe.write_text(recipe.read_text().replace("evaluations: 3", "evaluations: 4"))
    plan = planned(capsys, recipe)
    assert [step["name"] for step in plan["steps"] if step["state"] == "run"] == ["search", "merge", "evaluate/merge"]
    assert "other options" in plan["steps"][3]["note"]
    (run / "sparsify" / "model.safetensors").write_bytes(b"cut")
    plan = planned(capsys, recipe)
    assert plan["steps"][0]["state"] == "run" and "truncated" in plan["steps"][0]["note"]
    assert plan["steps"][1]["state"] == "skip"  # the same result will be there again
    (run / "sparsify" / "model.safetensors").write_bytes(before["sparsify/model.safetensors"])
    assert snapshot(run) == before


@pytest.mark.parametrize("change", [
    {"sparsify": "{exclude: [x_proj]}"}, {"sparsify": "{pattern: '3:7'}"}, {"sparsify": "{calibration: gone.txt}"},
    {"quantize": "{group_size: 128}"}, {"quantize": ""}, {"train": ", target_modules: [qkv_proj]"},
    {"train": ", rank_groups: [q_proj+x_proj]"}, {"train": ", data_dir: gone"},
    *(pytest.param(change, marks=pytest.mark.slow) for change in (
        {"search": "{task: arithmetic, split: test}"}, {"search": "{}"}, {"evaluate": "{task: gsm9k}"})),
])  # fmt: skip
def test_the_same_usage_errors_as_the_run(change: dict[str, str], dense: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text_of(dense, tmp_path / "run", **change))
    early = fails(capsys, 2, "run", recipe, "--dry-run")
    assert not (tmp_path / "run").exists()
    assert fails(capsys, 2, "run", recipe) == early


def test_brackets_in_options_are_no_markup(dense: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "d.jsonl").write_text('{"q": "a", "a": "b"}\n' * 30)
    train = f", data: {tmp_path}/d.jsonl, prompt: '[INST] {{q}} [/INST]', completion: '{{a}}'"
    text = text_of(dense, tmp_path / "run", train, search="", evaluate="").replace(" task: arithmetic,", "")
    (tmp_path / "recipe.yaml").write_text(text)
    code, out, err = call(capsys, "run", tmp_path / "recipe.yaml", "--dry-run")
    assert code == 0 and "[/INST]" in out, err


def test_what_is_in_the_way_is_seen(dense: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text_of(dense, tmp_path / "run"))
    (tmp_path / "run" / "sparsify").mkdir(parents=True)
    (tmp_path / "run" / "sparsify" / "mine.txt").write_text("keep")
    assert "was not written by sqft" in fails(capsys, 2, "run", recipe, "--dry-run")
    assert "there is no folder" in fails(capsys, 2, "run", recipe, "--dry-run", "--model", "/no/such/model")


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_from_the_configuration_alone(name: str, tmp_path: Path, capsys) -> None:
    """No weights, no data; and a hub name, which is not even that without network."""
    family, parameters, sizes = FULL_SIZE[name]
    AutoConfig.for_model(family, dtype="bfloat16", **sizes).save_pretrained(tmp_path / "model")
    plan = planned(capsys, name, "--model", tmp_path / "model", "--output", tmp_path / "run")
    assert plan["parameters"] == parameters and plan["weight_bytes"] == 2 * parameters
    steps = {step["name"]: step for step in plan["steps"]}
    assert all(step["seconds"] > 0 and step["memory_bytes"] > 10**9 for step in plan["steps"])
    assert 2.5 < plan["weight_bytes"] / steps["quantize"]["disk_bytes"] < 4  # INT4, and float embeddings and head
    assert steps["train"]["flops"] > 4 * 7217 * 150 * 2 * 3 * parameters  # epochs, examples, tokens, three products
    plan = planned(capsys, name, "--output", tmp_path / "run")
    assert plan["seconds"] is None and "model not here: no estimate" in plan["notes"][0]
    assert [step["name"] for step in plan["steps"]] == list(steps) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "opt", "bloom"])
def test_forward_flops_are_those_that_torch_counts(family: str) -> None:
    model = pico_model(family)
    model.set_attn_implementation("eager")  # the counter does not know the fused kernel
    tokens = torch.zeros(2, 48, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False)
    found = forward(shape_of(model), tokens.numel(), tokens.shape[1])
    assert found == pytest.approx(counter.get_total_flops(), rel=0.15)


def cost_of_training(monkeypatch, shape: Shape, config: sqft.TrainConfig, examples: int, tokens: int) -> Cost:
    monkeypatch.setattr(estimate, "of_training", lambda config, count: [(tokens // 2, tokens // 2)] * examples)
    return estimate.train(shape, config)


def test_a_training_step_of_lora_has_the_flops_that_torch_counts(dense: Path, monkeypatch) -> None:
    model, _ = sqft.load(dense)
    model.set_attn_implementation("eager")
    shape = shape_of(model)
    config = sqft.TrainConfig(adapter="lora", max_steps=1, batch_size=2, r=1)  # the factors are not counted
    peft_model = sqft.attach(model, sqft.SqftConfig(r=1, lora_alpha=8, sparse_adapter=False))
    tokens = torch.zeros(2, 48, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        peft_model(tokens, labels=tokens, use_cache=False).loss.backward()
    found = cost_of_training(monkeypatch, shape, config, examples=2, tokens=48)
    assert found.products == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_a_masked_adapter_costs_one_product_more_and_with_dropout_three(tmp_path: Path, monkeypatch) -> None:
    """The table of docs/sparse-peft.md, in products over the adapted weights."""
    AutoConfig.for_model("llama", hidden_size=1024, intermediate_size=4096).save_pretrained(tmp_path)
    shape = shape_of(skeleton(tmp_path))
    shape = shape._replace(
        adapted=shape.weights, adapted_active=shape.active, hidden=0, vocabulary=0
    )  # no head, no attention

    def products(pipeline: str, **options: object) -> float:
        config = sqft.TrainConfig(adapter=pipeline, max_steps=1, batch_size=4, r=1, **options)  # type: ignore
        cost = cost_of_training(monkeypatch, shape, config, examples=4, tokens=1000)
        return cost.products / (2 * 4 * 512 * shape.weights)  # 512: max_length

    for checkpointing, costs in ((False, (2, 3, 5)), (True, (3, 4, 7))):
        options = {"gradient_checkpointing": checkpointing}
        found = (products("lora", **options), products("sparse-peft", **options),
                 products("sparse-peft", lora_dropout=0.1, **options))  # fmt: skip
        assert found == pytest.approx(costs, abs=0.05)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba", "nemotron_h",
                                    "gemma4_text", "llama4_text"])  # fmt: skip
def test_of_experts_those_count_that_a_token_reaches(family: str) -> None:
    """As counted in a forward; Llama 4's compute all tokens."""
    model, counted = pico_model(family), []
    shape, architecture = shape_of(model), describe(model)
    experts = [weight for weight in architecture.weights() if ".experts." in weight.name]
    for weight in experts:
        count = partial(
            lambda size, module, x: counted.append(size * x[0].numel() // x[0].shape[-1]), math.prod(weight.shape)
        )
        weight.module.register_forward_pre_hook(count)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(tokens, use_cache=False)
    others = shape.weights - sum(math.prod(weight.shape) for weight in experts)
    assert sum(counted) == tokens.numel() * (shape.active - others)
    assert (shape.active < shape.weights) == (family != "llama4_text")


@pytest.mark.parametrize("adapter", ["lora", "sparse-peft", "sparse-full"])
def test_more_experts_do_not_make_training_longer(adapter: str, monkeypatch) -> None:
    """If as many as before compute a token."""
    found = []
    for count in (4, 16):
        model = pico_model("mixtral", num_local_experts=count)
        architecture = describe(model)
        shape = estimate.adapted(shape_of(model), model, architecture, architecture.names(), 4)
        config = sqft.TrainConfig(adapter=adapter, max_steps=1, batch_size=2)
        found.append((cost_of_training(monkeypatch, shape, config, examples=2, tokens=48), shape))
    (few, small), (many, large) = found
    assert many.products == pytest.approx(few.products) and many.memory > few.memory
    assert large.adapted == large.weights > 2 * small.weights and large.adapted_active == pytest.approx(small.active)


def test_batches_count_padding() -> None:
    lengths = [(10, 10), (90, 10), (10, 10), (90, 10)]
    config = sqft.TrainConfig(batch_size=2, epochs=2, max_length=64)
    assert batches(lengths, config) == (4, 2 * (2 * 20 + 2 * 64), 64)
    assert batches(lengths, sqft.TrainConfig(batch_size=2, epochs=2, max_length=64, group_by_length=False)) == (
        4, 2 * 4 * 64, 64)  # fmt: skip
    assert batches(lengths, sqft.TrainConfig(batch_size=2, max_steps=1, max_length=64, epochs=1))[:2] == (1, 84)
    assert batches(lengths, sqft.TrainConfig(batch_size=1, packing=True, max_length=64, epochs=1))[:2] == (2, 128)


def test_time_is_work_over_speed(dense: Path) -> None:
    shape = shape_of(skeleton(dense))
    cost = estimate.quantize(shape, sqft.QuantizeConfig())
    assert min(cost.products, cost.float32, cost.moved, cost.fixed) > 0
    slow, fast = (Speed("", rate, rate, rate) for rate in (1e9, 2e9))
    assert cost.seconds(slow) - cost.fixed == pytest.approx(2 * (cost.seconds(fast) - cost.fixed))
    assert cost.seconds(slow) - cost.fixed == pytest.approx((cost.products + cost.float32 + cost.moved) / 1e9)


def test_tokens_are_counted_by_the_models_own_tokenizer(tmp_path: Path) -> None:
    texts = ["the quick brown fox " * n for n in range(1, 600)]
    tokenizer = pico_tokenizer()
    real = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert counted(texts, tokenizer) == pytest.approx(real, rel=0.02, abs=2)
    assert sum(counted(texts)) < 0.5 * sum(real)  # its tokens are single characters, which is not known without it
    assert counted(["", ""], tokenizer) == [0, 0] and counted([], tokenizer) == []
    sqft.save(pico_model(), tokenizer, tmp_path / "model")
    assert Walk(str(tmp_path / "model")).shapes[str(tmp_path / "model")].counter(texts) == counted(texts, tokenizer)


def test_memory_of_options_is_that_of_one_options_tokens() -> None:
    """Not that of all of a problem's together."""
    shape = shape_of(pico_model())
    problems = Problems([(10, 4 * 5)] * 64, 0, 5)
    found = estimate._score(shape, problems, 32)
    assert found.memory == 32 * 5 * shape.vocabulary * 8 + 32 * 10 * shape.cached * 4
    assert shape.cached == 2 * 2 * 2 * 8  # layers, keys and values, heads, features
