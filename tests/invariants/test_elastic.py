"""Elastic rank: a sub-adapter is a slice, training sets it and nothing else does, and every way to it is the same."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_pipeline import interrupted_after
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sqft
from sqft.adapters.config import PEFT_TYPE
from sqft.adapters.groups import make_groups
from sqft.adapters.peft_bridge import adapter_layers, merged_weight
from sqft.elastic.handle import RECORDS, Elastic
from sqft.searching.choose import alpha_for
from sqft.sparsity.masks import mask_of

PIPELINES = ("sparse-peft", "qa-sparse-peft", "lora", "sqft")
OWN = tuple(f"{name}, own scaling" for name in PIPELINES)
SPACE = [6, 4, 2]


def training(pipeline: str = "sparse-peft", **options) -> sqft.TrainConfig:
    return sqft.TrainConfig(**{"adapter": pipeline, "max_steps": 6, "batch_size": 4, "lora_alpha": 9,
                               "learning_rate": 0.02, "search_space": SPACE, **options})  # fmt: skip


@pytest.fixture(scope="module")
def bases(sparse: Path, tokens, tmp_path_factory) -> dict[str, Path]:
    packed = tmp_path_factory.mktemp("packed") / "model"
    sqft.quantize(sparse, sqft.QuantizeConfig(group_size=32), tokens, out=packed)
    return {name: packed if name in ("qa-sparse-peft", "sqft") else sparse for name in PIPELINES}


@pytest.fixture(scope="module")
def supers(bases, examples, tmp_path_factory) -> dict[str, Path]:
    """A trained super-adapter of each pipeline and scaling."""
    folder = tmp_path_factory.mktemp("supers")
    for name, base in bases.items():
        sqft.train(base, training(name), examples, out=folder / name)
        own = training(name, rank_scaling="own", max_steps=3)
        sqft.train(base, own, examples, out=folder / f"{name}, own scaling")
    return {name: folder / name for name in (*PIPELINES, *OWN)}


def some_ranks(model, seed: int = 0) -> dict[str, int]:
    rng = random.Random(seed)
    return {group.name: rng.choice(group.choices) for group in Elastic(model).groups}


@torch.no_grad()
def logits(model, tokens) -> torch.Tensor:
    return model.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_sub_adapter_is_the_super_adapter_without_its_upper_ranks(pipeline: str, supers, tokens) -> None:
    model, _ = sqft.load(supers[pipeline])
    whole = logits(model, tokens)
    ranks = some_ranks(model)
    sqft.set_ranks(model, ranks)
    assert sqft.get_ranks(model) == ranks
    part = logits(model, tokens)
    assert (part - whole).abs().max() > 1e-3
    with torch.no_grad():
        for group in Elastic(model).groups:
            for name in group.modules:
                layer = adapter_layers(model)[name]
                assert layer.scaling["default"] == 9 / 6
                layer.lora_A["default"].weight[ranks[group.name] :] = 0
    sqft.set_ranks(model)
    torch.testing.assert_close(logits(model, tokens), part, atol=2e-5, rtol=0)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("scaling", ["largest", "own"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_sub_adapter_computes_with_its_rank_and_scale(pipeline: str, scaling: str, rslora: bool, bases) -> None:
    """Outputs, gradients and what is merged against float64."""
    model, _ = sqft.load(bases[pipeline])
    config = sqft.SqftConfig(kind=pipeline, search_space=SPACE, lora_alpha=9, use_rslora=rslora, rank_scaling=scaling)
    model = sqft.attach(model, config)
    elastic = Elastic(model)
    layer = next(iter(elastic.layers.values()))
    g = torch.Generator().manual_seed(0)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.data = 0.1 * torch.randn(b.shape, generator=g)
    x = torch.randn(7, a.shape[1], generator=g, requires_grad=True)
    base = layer.get_base_layer()
    w_OI = base.dequantize().double() if hasattr(base, "dequantize") else base.weight.detach().double()
    mask_OI = mask_of(base).double() if "peft" in pipeline else torch.ones_like(w_OI)
    for rank in SPACE:
        elastic.set({elastic.groups[0].name: rank})
        of = rank if scaling == "own" else max(SPACE)
        scale = 9 / (of**0.5 if rslora else of)
        factors = [v.detach().double().requires_grad_() for v in (a, b)]
        inputs = x.detach().double().requires_grad_()
        delta_OI = scale * mask_OI * (factors[1][:, :rank] @ factors[0][:rank])
        aimed_OI = w_OI + delta_OI
        if pipeline == "qa-sparse-peft":  # rounding is passed through, but where it clamps
            grid = base.grid()
            units = aimed_OI / grid.spread(grid.scale_OG, x.shape[1]) + grid.spread(grid.zero_OG, x.shape[1])
            inside = (units >= -0.5) & (units <= 15.5)
            rounded = layer.effective_weight("default").detach().double()
            steps = (rounded - aimed_OI.detach()) / grid.spread(grid.scale_OG, x.shape[1])
            assert float(steps[inside].abs().max()) < 0.501
            aimed_OI = torch.where(inside, aimed_OI + (rounded - aimed_OI).detach(), rounded)
        y = layer(x)
        expected = inputs @ aimed_OI.mT + (0 if base.bias is None else base.bias.double())
        torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=1e-5)
        dy = torch.randn(y.shape, generator=g)
        ours = torch.autograd.grad(y, (x, a, b), dy)
        theirs = torch.autograd.grad(expected, (inputs, *factors), dy.double())
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-4)
        if pipeline != "qa-sparse-peft":
            torch.testing.assert_close(layer.get_delta_weight("default").double(), delta_OI, atol=1e-6, rtol=1e-5)
        if pipeline in ("sparse-peft", "lora"):
            torch.testing.assert_close(merged_weight(layer, "default").double(), aimed_OI, atol=1e-6, rtol=1e-5)
    with pytest.raises(sqft.UsageError, match="rank_scaling goes with"):
        sqft.SqftConfig(rank_scaling="own")
    with pytest.raises(sqft.UsageError, match="choose largest or own"):
        sqft.SqftConfig(search_space=SPACE, rank_scaling="mine")


@pytest.mark.parametrize("pipeline", [*PIPELINES, *OWN])
def test_extracted_merged_and_live_sub_adapters_are_one(pipeline: str, supers, tokens, tmp_path: Path) -> None:
    model, _ = sqft.load(supers[pipeline])
    ranks = some_ranks(model, seed=1)
    (tmp_path / "ranks.yaml").write_text(json.dumps(ranks))
    sqft.set_ranks(model, ranks)
    live = logits(model, tokens)
    metrics = sqft.extract(supers[pipeline], str(tmp_path / "ranks.yaml"), tmp_path / "sub")
    assert metrics["parameters"] == Elastic(model).space.parameters(ranks)
    weights = load_file(tmp_path / "sub" / "adapter_model.safetensors")
    assert sum(w.numel() for w in weights.values()) == metrics["parameters"]
    sub, _ = sqft.load(tmp_path / "sub")
    torch.testing.assert_close(logits(sub, tokens), live, atol=1e-5, rtol=0)
    if pipeline.split(",")[0] in ("sparse-peft", "qa-sparse-peft"):
        choice = sqft.MergeConfig(ranks=str(tmp_path / "ranks.yaml"))
        one = sqft.merge(supers[pipeline], choice, out=tmp_path / "one")
        assert one["zeros_kept"] == 1.0 and one["max_logit_difference"] < 1e-4
        sqft.merge(tmp_path / "sub", out=tmp_path / "two")
        sqft.merge(supers[pipeline], ranks=ranks, out=tmp_path / "three")
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")]
        assert files[0] == files[1] == files[2]
        merged = sqft.merge(model, ranks=ranks)
        torch.testing.assert_close(logits(merged, tokens), live, atol=1e-4, rtol=0)
    else:
        with pytest.raises(sqft.UsageError, match="fill the pruned weights|INT model"):
            sqft.merge(supers[pipeline], out=tmp_path / "one")


@pytest.mark.parametrize("adapter", ["lora", "lora, own scaling"])
def test_a_plain_lora_sub_adapter_is_plain_peft(adapter: str, supers, bases, tokens, tmp_path: Path) -> None:
    model, _ = sqft.load(supers[adapter])
    sqft.set_ranks(model, {name: 4 if i % 2 else 2 for i, name in enumerate(sqft.get_ranks(model))})
    live = logits(model, tokens)
    (tmp_path / "ranks.yaml").write_text(json.dumps(sqft.get_ranks(model)))
    sqft.extract(supers[adapter], str(tmp_path / "ranks.yaml"), tmp_path / "sub")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["lora"]), tmp_path / "sub")
    assert type(next(iter(adapter_layers(theirs).values()))).__module__.startswith("peft.")
    torch.testing.assert_close(logits(theirs, tokens), live, atol=1e-5, rtol=0)
    # The super-adapter itself must not load in plain PEFT as if its rank were fixed.
    assert json.loads((supers[adapter] / "adapter_config.json").read_text())["peft_type"] == PEFT_TYPE


@pytest.mark.parametrize(("strategy", "scaling"), [("uniform", "largest"), ("sandwich", "own"), ("weighted", "own")])
@pytest.mark.parametrize("pipeline", ["sparse-peft", "qa-sparse-peft", "lora"])
def test_gradient_checkpointing_trains_the_same_sub_adapters(pipeline: str, strategy: str, scaling: str, bases, examples, tmp_path: Path) -> None:  # fmt: skip
    """Were a rank drawn in a forward, the recomputed one would be another than the loss saw."""
    weights = []
    for checkpointing in (False, True):
        config = training(pipeline, gradient_checkpointing=checkpointing, rank_strategy=strategy, rank_scaling=scaling)
        sqft.train(bases[pipeline], config, examples, out=tmp_path / str(checkpointing))
        weights.append(load_file(tmp_path / str(checkpointing) / "adapter_model.safetensors"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation": 2, "rank_every": "micro-batch"}])
def test_resumed_training_equals_a_straight_run_records_too(options, sparse: Path, examples, tmp_path: Path, monkeypatch) -> None:  # fmt: skip
    config = training(max_steps=7, save_steps=2, **options)
    sqft.train(sparse, config, examples, out=tmp_path / "straight")
    interrupted_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        sqft.train(sparse, config, examples, out=tmp_path / "resumed")
    monkeypatch.undo()
    sqft.train(sparse, config, examples, out=tmp_path / "resumed")
    straight, resumed = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("straight", "resumed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    records = [json.loads((tmp_path / d / RECORDS).read_text())["records"] for d in ("straight", "resumed")]
    assert records[0] == records[1] and len(records[0]) == 7 * options.get("gradient_accumulation", 1)
    assert len({tuple(choices) for choices, _ in records[0]}) > 5


def plain_trainer(model, tokenizer, scheduler, folder: Path, steps: int, **options) -> Trainer:
    ids = tokenizer("the quick brown fox jumps over the lazy dog")["input_ids"]
    rows = [{"input_ids": ids, "labels": ids} for _ in range(64)]
    arguments = TrainingArguments(output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, report_to=[],
                                  learning_rate=0.01, remove_unused_columns=False, save_strategy="no", **options)  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[scheduler])


class Fixed(sqft.RankScheduler):
    """Trains the largest first, then the smallest alone."""

    def draw(self, groups, step, micro, micro_batches):
        return {group.name: group.choices[0 if step < 3 else -1] for group in groups}


def test_ranks_outside_a_step_do_not_move(sparse: Path, tmp_path: Path) -> None:
    """Adam's momentum of earlier steps would move them."""
    model, tokenizer = sqft.load(sparse)
    model = sqft.attach(model, sqft.SqftConfig(search_space=SPACE, lora_alpha=9))
    seen: list[dict[str, torch.Tensor]] = []

    class Look(Fixed):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            seen.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name})

    plain_trainer(model, tokenizer, Look(), tmp_path, 6).train()
    for name, after in seen[-1].items():
        before, cut = seen[2][name], SPACE[-1]
        moved, still = (after[:cut], after[cut:]) if "lora_A" in name else (after[:, :cut], after[:, cut:])
        old = before[:cut] if "lora_A" in name else before[:, :cut]
        assert torch.equal(still, before[cut:] if "lora_A" in name else before[:, cut:])
        assert not torch.equal(moved, old)


def test_plain_trainer_draws_by_its_own_generator(sparse: Path, tmp_path: Path) -> None:
    """Whatever else draws random numbers, the ranks of a step are those of the seed."""
    runs = []
    for noise in (False, True):
        model, tokenizer = sqft.load(sparse)
        model = sqft.attach(model, sqft.SqftConfig(search_space=SPACE))
        scheduler = sqft.RankScheduler(seed=3, micro_batches=True)
        if noise:
            torch.manual_seed(99)
            random.seed(99)
        plain_trainer(model, tokenizer, scheduler, tmp_path, 4, gradient_accumulation_steps=2, seed=noise + 1).train()
        assert sqft.get_ranks(model) == {group.name: SPACE[0] for group in Elastic(model).groups}
        runs.append([choices for choices, _ in scheduler.records])
        assert all(2 < loss < 8 for _, loss in scheduler.records)
    assert runs[0] == runs[1] and len(runs[0]) == 8
    other = sqft.RankScheduler(seed=4).draw(Elastic(model).groups, 0, 0, 1)
    assert other != sqft.RankScheduler(seed=3).draw(Elastic(model).groups, 0, 0, 1)


def test_strategies_draw_what_they_say() -> None:
    groups = make_groups([f"model.layers.{i}.mlp.up_proj" for i in range(300)], [], [30, 20, 10])
    sandwich = [sqft.RankScheduler("sandwich").draw(groups, step, 0, 1) for step in range(3)]
    assert set(sandwich[0].values()) == {30} and set(sandwich[1].values()) == {10}
    assert set(sandwich[2].values()) == {30, 20, 10}
    for strategy, expected in (("uniform", (1 / 3, 1 / 3, 1 / 3)), ("weighted", (3 / 6, 2 / 6, 1 / 6))):
        drawn = [r for step in range(20) for r in sqft.RankScheduler(strategy).draw(groups, step, 0, 1).values()]
        assert [drawn.count(r) / len(drawn) for r in (30, 20, 10)] == pytest.approx(expected, abs=0.02)


NAMES = [f"model.layers.{i}.{name}" for i in (0, 1) for name in
         ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip


def test_groups() -> None:
    default = make_groups(NAMES, [], [16, 32])
    assert [g.name for g in default] == [f"{i}.{n}" for i in (0, 1) for n in ("qkv", "up_proj", "down_proj")]
    assert default[0].modules == tuple(NAMES[:3]) and default[0].choices == (32, 16)
    assert len(make_groups(NAMES, ["module"], [4])) == 10
    layers = make_groups(NAMES, ["layer"], [4])
    assert [len(g.modules) for g in layers] == [5, 5]
    own = make_groups(NAMES, ["q_proj+v_proj", "*.up_proj=8/2"], [4])
    assert {g.name: (len(g.modules), g.choices) for g in own} == {
        f"{i}.{n}": c for i in (0, 1) for n, c in (("q_proj+v_proj", (2, (4,))), ("*.up_proj", (1, (8, 2))))
    }
    for spec, message in ((["q_porj"], "q_porj.*did you mean 'q_proj'"), (["q_proj=x"], "greater than 0"),
                          (["q_proj", "*_proj"], "both match"), (["up_proj=0"], "greater than 0")):  # fmt: skip
        with pytest.raises(sqft.UsageError, match=message):
            make_groups(NAMES, spec, [4])


def test_wrong_ranks_are_refused(supers, trained: Path, tmp_path: Path) -> None:
    model, _ = sqft.load(supers["lora"])
    with pytest.raises(sqft.UsageError, match=r"no rank group '0\.qvk'.*0\.qkv"):
        sqft.set_ranks(model, {"0.qvk": 4})
    with pytest.raises(sqft.UsageError, match="rank 5 is not a choice"):
        sqft.set_ranks(model, {"0.qkv": 5})
    with pytest.raises(sqft.UsageError, match="rank is fixed"):
        sqft.set_ranks(sqft.load(trained)[0], {"0.qkv": 4})
    with pytest.raises(sqft.UsageError, match="rank is fixed"):
        sqft.extract(trained, "median", tmp_path / "out")
    with pytest.raises(sqft.UsageError, match="neither a file nor one of"):
        sqft.extract(supers["lora"], "meidan", tmp_path / "out")
    (tmp_path / "bad.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(sqft.UsageError, match="it has to be a mapping"):
        sqft.merge(supers["sparse-peft"], sqft.MergeConfig(ranks=str(tmp_path / "bad.yaml")), out=tmp_path / "out")
    with pytest.raises(sqft.UsageError, match="rank_groups go with"):
        sqft.SqftConfig(rank_groups=["layer"])
    assert not (tmp_path / "out").exists()


def test_alphas_give_the_scaling_that_products_use() -> None:
    """Factors of float32 are multiplied by the scaling as float32."""
    for alpha in (9, 10, 64, 7):
        for largest in range(1, 65):
            for rank in range(1, largest + 1):
                assert torch.tensor(alpha_for(alpha / largest, rank) / rank) == torch.tensor(alpha / largest)
                own = alpha / largest * (largest / rank)
                assert alpha_for(own, rank) == alpha and torch.tensor(own) == torch.tensor(alpha / rank)
    assert alpha_for(2.0, 24) == 48 and isinstance(alpha_for(2.0, 24), int)


def test_a_live_adapter_is_searched_by_a_scorer_of_ones_own(supers) -> None:
    model, _ = sqft.load(supers["qa-sparse-peft"])
    groups = Elastic(model).groups
    wanted = {group.name: SPACE[i % 3] for i, group in enumerate(groups)}

    def scorer(live) -> float:
        assert not live.training
        return -sum(abs(rank - wanted[name]) for name, rank in sqft.get_ranks(live).items())

    best = sqft.search(model, sqft.SearchConfig(evaluations=80), scorer)
    assert best == wanted == sqft.get_ranks(model)
    cheapest = sqft.search(model, sqft.SearchConfig(evaluations=10, pick="smallest-within 99%"), lambda live: 1.0)
    assert set(cheapest.values()) == {SPACE[-1]}
    latency = sqft.search(model, sqft.SearchConfig(strategy="random", evaluations=4, cost="latency"), scorer)
    assert latency.keys() == wanted.keys()
    for message, options in (("needs its tokenizer", {"config": sqft.SearchConfig(task="arithmetic")}),
                             ("searched in memory", {"out": "x", "scorer": scorer}),
                             ("goes with a task", {"config": sqft.SearchConfig(screen=2), "scorer": scorer})):  # fmt: skip
        with pytest.raises(sqft.UsageError, match=message):
            sqft.search(model, **options)
