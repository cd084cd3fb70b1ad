"""What can be trained: the kept weights themselves, norms beside adapters, and where adapters begin."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pico import FAMILIES, pico_folder, pico_model, pico_tokenizer
from safetensors.torch import load_file
from test_training import at, log_of
from torch import nn
from torch.nn.utils import parametrize

import sqft
from sqft.adapters.peft_bridge import adapter_layers
from sqft.elastic.handle import Elastic
from sqft.models.discover import describe, norms
from sqft.planning.walk import Walk
from sqft.recipe import load_recipe, steps, with_adapter
from sqft.registry import KINDS
from sqft.sparsity.masks import collect_masks, mask_of
from sqft.training import whole
from sqft.training.callbacks import ProgressBar
from sqft.training.data import collate, tokenize_all
from sqft.training.initial import gradient_rows

FULL = {"adapter": "sparse-full", "batch_size": 4, "learning_rate": 0.01}
ADAPTERS = {"batch_size": 4, "r": 4, "lora_alpha": 8, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def half(tokens, tmp_path_factory) -> Path:
    """A sparse pico Llama in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    pico_folder(folder / "dense", dtype=torch.bfloat16)
    sqft.sparsify(folder / "dense", sqft.SparsifyConfig(), tokens, out=folder / "sparse")
    return folder / "sparse"


@pytest.fixture(scope="module")
def half_packed(half: Path, tokens, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("half") / "packed"
    sqft.quantize(half, sqft.QuantizeConfig(group_size=32), tokens, out=out)
    return out


class Kept(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.mask * weight


def test_sparse_full_is_adamw_on_the_kept_weights_and_norms(examples, tokens) -> None:
    """In float64, against autograd through M o W, one whole batch a step."""
    model, tokenizer = pico_model(dtype=torch.float64), pico_tokenizer()
    sqft.sparsify(model, sqft.SparsifyConfig(), tokens)
    reference: Any = copy.deepcopy(model)
    config = sqft.TrainConfig(
        **{**FULL, "learning_rate": 1e-3}, max_steps=3, weight_decay=0.1, scheduler="constant_with_warmup"
    )
    metrics = sqft.train(model, config, examples[:4], tokenizer=tokenizer)

    reference.requires_grad_(False)
    decayed, others, kept = [], [], 0
    for weight in describe(reference).weights():
        mask = mask_of(weight.module)
        assert mask is not None
        kept += int(mask.sum())
        parametrize.register_parametrization(weight.module, "weight", Kept(mask))
        decayed.append(weight.module.parametrizations.weight.original)
    for name, module in reference.named_modules():
        if "norm" in name:
            others.append(module.weight)
    for parameter in (*decayed, *others):
        parameter.requires_grad_(True)
    assert metrics["trainable_parameters"] == kept + sum(p.numel() for p in others)
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-3, weight_decay=0.1
    )
    batch = collate(tokenize_all(examples[:4], tokenizer, config), 0)
    for _ in range(3):
        logits = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_([*decayed, *others], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    expected, found = reference.state_dict(), model.state_dict()
    changed = 0
    for name, tensor in found.items():
        other = expected.get(name, expected.get(name.replace(".weight", ".parametrizations.weight.original")))
        torch.testing.assert_close(tensor, other, atol=1e-9, rtol=0)
        changed += not torch.equal(tensor, pico_model(dtype=torch.float64).state_dict()[name])
    assert changed == 14 + 5
    for weight in describe(model).weights():
        assert not weight.read()[~mask_of(weight.module)].any() and not weight.parameter.grad
    assert all(p.requires_grad for p in model.parameters()) and collect_masks(model)


def test_sparse_full_writes_a_model_in_the_bases_precision(half: Path, examples, tokens, tmp_path: Path) -> None:
    metrics = sqft.train(half, sqft.TrainConfig(**FULL, max_steps=4, weight_decay=0.1), examples, out=tmp_path / "full")
    assert metrics["zeros_kept"] == 1.0 and metrics["filled"] == 0 and metrics["pruned"] > 0
    assert metrics["max_logit_difference"] == 0 and metrics["sparsity"] == 0.5
    before, after = (load_file(folder / "model.safetensors") for folder in (half, tmp_path / "full"))
    assert {t.dtype for t in after.values()} == {torch.bfloat16} and before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight"}
    masks = [load_file(folder / "masks" / "masks.safetensors") for folder in (half, tmp_path / "full")]
    assert masks[0].keys() == masks[1].keys() and all(torch.equal(masks[0][k], masks[1][k]) for k in masks[0])
    assert json.loads((half / "config.json").read_text()) == json.loads((tmp_path / "full" / "config.json").read_text())
    assert (tmp_path / "full" / "training_log.jsonl").is_file()
    with pytest.raises(sqft.UsageError, match="is one model already .* nothing to merge"):
        sqft.merge(tmp_path / "full", out=tmp_path / "merged")
    sqft.quantize(tmp_path / "full", sqft.QuantizeConfig(group_size=32), tokens, out=tmp_path / "packed")
    sqft.export(tmp_path / "full", out=tmp_path / "exported")
    assert (
        sqft.evaluate(tmp_path / "full", sqft.EvaluateConfig(text="builtin", length=32, max_tokens=64))["perplexity"]
        > 1
    )


@pytest.mark.parametrize("slow", [True, False])
def test_sparse_full_multiplies_in_bfloat16_where_that_is_not_slow(slow: bool, monkeypatch) -> None:
    monkeypatch.setattr(whole, "is_slow_half", lambda dtype: slow)
    config = sqft.TrainConfig(**FULL, device="cpu")
    assert whole.precision_of(pico_model(dtype=torch.bfloat16), config).precision == ("auto" if slow else "bfloat16")
    asked = sqft.TrainConfig(**{**FULL, "precision": "bfloat16"}, device="cpu")
    assert whole.precision_of(pico_model(dtype=torch.bfloat16), asked).precision == "bfloat16"
    assert whole.precision_of(pico_model(), config).precision == "auto"


@pytest.mark.parametrize("what", ["sparse-full", "sparse-full, dense", "norms and gradient"])
def test_a_resumed_run_is_a_straight_one(
    what: str, half: Path, dense: Path, examples, tmp_path: Path, monkeypatch
) -> None:
    options = (
        FULL if "full" in what else {**ADAPTERS, "init": "gradient", "train_norms": True, "target_modules": ["all"]}
    )
    config = sqft.TrainConfig(**options, max_steps=7, save_steps=3, logging_steps=2)
    source = dense if "dense" in what else half
    straight = sqft.train(source, config, examples, out=tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ProgressBar, "on_step_end", at(5, ProgressBar.on_step_end))
        sqft.train(source, config, examples, out=tmp_path / "resumed")
    with monkeypatch.context() as patch:
        patch.setattr("sqft.training.loop.from_gradient", None)  # a resumed run does not begin again
        resumed = sqft.train(source, config, examples, out=tmp_path / "resumed")
    assert straight["loss"] == resumed["loss"] and log_of(tmp_path / "straight") == log_of(tmp_path / "resumed")
    file = "model.safetensors" if "full" in what else "adapter_model.safetensors"
    one, two = (load_file(tmp_path / folder / file) for folder in ("straight", "resumed"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_what_does_not_go_with_sparse_full(sparse: Path, half_packed: Path, examples, tmp_path: Path) -> None:
    for option in (
        {"r": 8},
        {"search_space": [4, 2]},
        {"train_norms": True},
        {"init": "gradient"},
        {"target_modules": ["all"]},
    ):
        with pytest.raises(sqft.UsageError, match=f"{next(iter(option))} is about adapters"):
            sqft.TrainConfig(adapter="sparse-full", **option)
    with pytest.raises(sqft.UsageError, match="has no adapters to attach"):
        sqft.SqftConfig(kind="sparse-full")
    with pytest.raises(sqft.UsageError, match="is an INT model"):
        sqft.train(half_packed, sqft.TrainConfig(**FULL), examples, out=tmp_path / "out")
    model, tokenizer = sqft.load(sparse)
    with pytest.raises(sqft.UsageError, match="has no adapters: sqft.attach"):
        sqft.train(model, sqft.TrainConfig(), examples, tokenizer=tokenizer)
    with pytest.raises(sqft.UsageError, match="carries adapters"):
        sqft.train(sqft.attach(model), sqft.TrainConfig(**FULL), examples, tokenizer=tokenizer)


def test_recipes_of_sparse_full(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"model: {dense}\noutput: {tmp_path}/out\nsparsify: {{}}\nquantize: {{}}\nmerge: {{}}\n"
        "train: {adapter: qa-sparse-peft, base: sparsify, task: arithmetic, search_space: [4, 2], r: 4, learning_rate: 0.001}\n"
        "search: {task: arithmetic}\nevaluate: {task: arithmetic, limit: 2}\n")  # fmt: skip
    recipe = with_adapter(load_recipe(tmp_path / "r.yaml"), "sparse-full")
    assert [step.name for step in steps(recipe)] == [
        "sparsify",
        "train",
        "evaluate/model",
        "evaluate/sparsify",
        "evaluate/train",
    ]
    assert recipe["train"] == sqft.TrainConfig(adapter="sparse-full", task="arithmetic")
    (tmp_path / "r.yaml").write_text(f"model: {dense}\noutput: {tmp_path}/out\nsparsify: {{}}\ntrain: {{adapter: sparse-full, task: arithmetic}}\n"
                                     "evaluate: {task: arithmetic, limit: 2}\n")  # fmt: skip
    plan = steps(load_recipe(tmp_path / "r.yaml"))
    assert [step.name for step in plan][-1] == "evaluate/train"
    walk = Walk(str(dense))
    needs = {step.name: walk.take(step) for step in plan}
    assert needs["train"]["disk_bytes"] == needs["sparsify"]["disk_bytes"] and needs["train"]["seconds"] > 0
    (tmp_path / "r.yaml").write_text((tmp_path / "r.yaml").read_text() + "merge: {}\n")
    with pytest.raises(sqft.UsageError, match="nothing to search or merge"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_found_in_every_family(family: str) -> None:
    model = pico_model(family)
    named = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    assert norms(model).keys() == named and named


@pytest.mark.parametrize("kind", ["sparse-peft", "qa-sparse-peft", "elastic"])
def test_norms_are_trained_in_float32_and_merged_as_they_computed(
    kind: str, half: Path, half_packed: Path, examples, tokens, tmp_path: Path
) -> None:
    """In bfloat16 around 1 a step of Adam would be rounded away."""
    base = half_packed if kind.startswith("qa") else half
    options = {"search_space": [4, 2]} if kind == "elastic" else {"adapter": kind}
    config = sqft.TrainConfig(**{**ADAPTERS, "learning_rate": 1e-3}, **options, max_steps=8, train_norms=True)
    metrics = sqft.train(base, config, examples, out=tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = {key.removeprefix("base_model.model."): t for key, t in stored.items() if "norm" in key}
    model, _ = sqft.load(tmp_path / "adapter")
    before, plain = norms(sqft.load(base)[0]), norms(sqft.load(half)[0])
    assert {key.removesuffix(".weight") for key in trained} == plain.keys() == before.keys()
    assert all(t.dtype == torch.float32 for t in trained.values())
    assert any(not torch.equal(t, t.bfloat16().float()) for t in trained.values())
    factors = sum(t.numel() for key, t in stored.items() if ".lora_" in key)
    assert metrics["trainable_parameters"] == factors + sum(t.numel() for t in trained.values())

    ranks = {group.name: 2 for group in Elastic(model).groups} or None
    if ranks:
        sqft.set_ranks(model, ranks)
    with torch.no_grad():
        unmerged = model(tokens).logits
    merged = sqft.merge(sqft.load(tmp_path / "adapter")[0], ranks=ranks)
    found = sqft.merge(tmp_path / "adapter", ranks=ranks, out=tmp_path / "merged")
    assert found["tensors_compared"] >= len(trained) and found["max_logit_difference"] == 0
    changed = 0
    for one in (merged, sqft.load(tmp_path / "merged")[0]):
        with torch.no_grad():
            assert torch.equal(one(tokens).logits, unmerged)
        assert "forward" not in {key for module in one.modules() for key in vars(module)}
        for name, norm in norms(one).items():
            assert norm.weight.dtype == torch.bfloat16 and torch.equal(
                norm.weight, trained[f"{name}.weight"].bfloat16()
            )
            changed += not torch.equal(norm.weight, plain[name].weight)
    assert changed


def test_a_live_adapter_with_norms_merges_and_a_failed_merge_puts_them_back(
    half: Path, examples, tokens, monkeypatch
) -> None:
    model, tokenizer = sqft.load(half)
    adapted = sqft.attach(model, sqft.SqftConfig(r=4, train_norms=True))
    config = sqft.TrainConfig(**{**ADAPTERS, "learning_rate": 1e-3}, max_steps=4)
    sqft.train(adapted, config, examples, tokenizer=tokenizer)
    with torch.no_grad():
        before = copy.deepcopy(adapted)(tokens).logits
        assert torch.equal(adapted(tokens).logits, before)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr("sqft.merging.stage.verify", lambda *args: (_ for _ in ()).throw(RuntimeError))
            sqft.merge(adapted)
        assert torch.equal(adapted(tokens).logits, before)
        assert torch.equal(sqft.merge(adapted)(tokens).logits, before)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (3, 20)])
def test_the_first_directions_of_a_gradient(shape: tuple[int, int]) -> None:
    g, a = torch.randn(shape, dtype=torch.float64), torch.randn(5, shape[1])
    found, (_, _, v) = gradient_rows(g, a), torch.linalg.svd(g)
    rank = min(5, *shape)
    assert found.dtype == torch.float32 and torch.equal(found[rank:], a[rank:])
    cosines = (found[:rank].double() * v[:rank]).sum(1).abs() * 3**0.5
    torch.testing.assert_close(cosines, torch.ones(rank, dtype=torch.float64))
    assert torch.equal(gradient_rows(torch.zeros(shape), a), a)


@pytest.mark.parametrize("kind", ["sparse-peft", "qa-sparse-peft", "lora"])
def test_adapters_begin_along_the_gradient_of_the_base(kind: str, examples, tokens) -> None:
    """G by autograd, of the masked weight or of what the integers mean; step 0 is the base, bit for bit."""
    model, tokenizer = pico_model(), pico_tokenizer()
    sqft.sparsify(model, sqft.SparsifyConfig(), tokens)
    plain = copy.deepcopy(model)
    if kind == "qa-sparse-peft":
        sqft.quantize(model, sqft.QuantizeConfig(group_size=32), tokens)
        for weight in describe(plain).weights():
            weight.write(model.get_submodule(weight.name).dequantize())
    with torch.no_grad():
        base = model(tokens).logits
    config = sqft.TrainConfig(adapter=kind, batch_size=4, r=4, init="gradient", max_steps=1, learning_rate=1e-30)
    runs = []
    for _ in range(2):
        adapted = sqft.attach(copy.deepcopy(model), sqft.SqftConfig(r=4, kind=kind))
        sqft.train(adapted, config, examples[:8], tokenizer=tokenizer)
        runs.append(adapted)
    with torch.no_grad():
        assert torch.equal(adapted(tokens).logits, base)
    plain.requires_grad_(True)
    for row in (rows := tokenize_all(examples[:8], tokenizer, config))[::4]:
        assert len(row["input_ids"]) == len(rows[0]["input_ids"])  # so that batches of any rows weigh the same
    plain(**collate(rows, 0)).loss.backward()
    first, second = (dict[str, Any](adapter_layers(run)) for run in runs)
    for path, layer in first.items():
        module: Any = plain.get_submodule(path)
        g = module.weight.grad.double()
        g = g if kind == "lora" else g * mask_of(module)
        a = layer.lora_A["default"].weight.detach()
        s = torch.linalg.svdvals(g)
        assert torch.equal(a, second[path].lora_A["default"].weight)
        torch.testing.assert_close(a.norm(dim=1), torch.full((4,), 3**-0.5))
        kept = (g @ (3**0.5 * a.double()).mT).norm() / s[:4].norm()  # of what four directions can keep
        assert kept == pytest.approx(1, abs=1e-3), path
    with pytest.raises(sqft.UsageError, match="were trained before"):
        trained = sqft.attach(copy.deepcopy(model), sqft.SqftConfig(r=4, kind=kind, init_lora_weights=False))
        sqft.train(trained, config, examples[:8], tokenizer=tokenizer)


def test_rslora_scales_by_the_root_of_the_rank_also_elastic_and_merges(
    sparse: Path, examples, tokens, tmp_path: Path
) -> None:
    config = sqft.TrainConfig(**{**ADAPTERS, "r": 16}, rslora=True, max_steps=2, search_space=[16, 4])
    sqft.train(sparse, config, examples, out=tmp_path / "adapter")
    model, _ = sqft.load(tmp_path / "adapter")
    sqft.set_ranks(model, ranks := {group.name: 4 for group in Elastic(model).groups})
    layer: Any = next(iter(adapter_layers(model).values()))
    assert layer.scaling["default"] == 8 / 16**0.5
    a, b = layer.lora_A["default"].weight[:4], layer.lora_B["default"].weight[:, :4]
    expected = layer.get_base_layer().weight + 2.0 * mask_of(layer.get_base_layer()) * (b @ a)
    torch.testing.assert_close(layer.merged_weight("default"), expected)
    assert sqft.merge(tmp_path / "adapter", ranks=ranks, out=tmp_path / "merged")["max_logit_difference"] == 0
    sqft.extract(tmp_path / "adapter", "minimal", tmp_path / "small")
    small: Any = next(iter(adapter_layers(sqft.load(tmp_path / "small")[0]).values()))
    assert small.scaling["default"] == layer.scaling["default"]


def test_the_train_stage_of_every_kind_says_what_it_makes() -> None:
    assert {name: KINDS[name].makes for name in KINDS if KINDS[name].makes == "model"} == {"sparse-full": "model"}
    assert {name for name in KINDS if not KINDS[name].one_model} == {"lora", "sqft"}
