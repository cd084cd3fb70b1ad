"""Scoring a live model: nothing cut, begin of text, empty contexts; whatever goes wrong, the model stays as it was."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pico import pico_model, pico_tokenizer
from tokenizers.processors import TemplateProcessing

import sqft
from sqft import folders
from sqft.adapters.peft_bridge import adapter_layers
from sqft.elastic.handle import get_ranks, set_ranks
from sqft.evaluation import perplexity, scoring, stage
from sqft.evaluation.choices import choose, likelihoods
from sqft.evaluation.generation import generate
from sqft.evaluation.scoring import completion_loss, unpacked
from sqft.models.discover import input_device
from sqft.probe import evaluating


def test_a_completion_loss_is_of_the_whole_text() -> None:
    """Longer than max_length, which is training's; what the model itself does not take is an error."""
    model, tokenizer = pico_model(), pico_tokenizer()
    model.config.max_position_embeddings = 700
    example = sqft.Example("word " * 120, " the end")
    ids = tokenizer(example.prompt + example.completion)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    tail = len(" the end") + 1
    expected = F.cross_entropy(logits[-tail:], torch.tensor(ids[-tail:]))
    assert len(ids) > 512 and math.isclose(
        completion_loss(model, tokenizer, [example], 2), float(expected), rel_tol=1e-5
    )
    model.config.max_position_embeddings = len(ids) - 1
    with pytest.raises(sqft.SqftError, match=f"has {len(ids)} tokens, but the model takes {len(ids) - 1}"):
        completion_loss(model, tokenizer, [example], 2)


def test_perplexity_windows_begin_with_the_begin_of_text(tmp_path: Path) -> None:
    model, tokenizer = pico_model(), pico_tokenizer()
    begin = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    ids = tokenizer((tmp_path / "t.txt").read_text() + "\n\n", add_special_tokens=False)["input_ids"]
    losses = []
    for i in range(len(ids) // 32):
        window = torch.tensor([[tokenizer.bos_token_id, *ids[32 * i + 1 : 32 * i + 32]]])
        with torch.no_grad():
            losses.append(F.cross_entropy(model(window).logits[0, :-1], window[0, 1:]))
    scores = perplexity.perplexity(model, tokenizer, str(tmp_path / "t.txt"), length=32)
    assert math.isclose(scores["perplexity"], math.exp(sum(losses) / len(losses)), rel_tol=1e-5)


@pytest.mark.parametrize("context", ["", "  "])
def test_an_empty_context_is_scored_after_the_begin_of_text(context: str) -> None:
    model, tokenizer = pico_model(), pico_tokenizer()
    options = ((context, "left"), (context, "right side"))
    (record,) = choose(model, tokenizer, [sqft.Example(context, "left", "left", options, 0)], 2, quiet=True)
    for (_, text), score in zip(options, record["log_likelihoods"], strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(context + text)["input_ids"]]])
        with torch.no_grad():
            expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        assert math.isclose(score, float(expected), rel_tol=1e-5)
    alone = generate(model, tokenizer, [""], 4, ())
    assert generate(model, tokenizer, ["", "a longer one"], 4, ())[:1] == alone


class Broken(Exception):
    pass


def broken(*args, **kwargs):
    raise Broken


def after(count: int, original):
    """``original``, which fails when it was called ``count`` times."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) if len(calls) <= count else broken()

    return counted


@pytest.fixture(scope="module")
def adapters(sparse: Path, tokens: torch.Tensor, tmp_path_factory) -> dict[str, Path]:
    """Untrained but not without effect: elastic masked adapters on a float and on a packed base."""
    root = tmp_path_factory.mktemp("adapters")
    sqft.quantize(sparse, sqft.QuantizeConfig(group_size=32), tokens, out=root / "packed")
    for name, base in (("float", sparse), ("packed", root / "packed")):
        model, tokenizer = sqft.load(base)
        config = sqft.SqftConfig(lora_alpha=8, search_space=[4, 2], quantization_aware=name == "packed")
        model = sqft.attach(model, config)
        for layer in adapter_layers(model).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        sqft.save(model, tokenizer, root / name / "adapter", parent=base)
    return {name: root / name / "adapter" for name in ("float", "packed")}


def state_of(model) -> tuple:
    """All that an evaluation may not change."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modules = {
        name: (type(module), module.training, getattr(module, "merged", None)) for name, module in model.named_modules()
    }
    return weights, modules, get_ranks(model)


def assert_same(one: tuple, two: tuple) -> None:
    assert one[1:] == two[1:] and one[0].keys() == two[0].keys()
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])


@pytest.mark.parametrize("kind", ["float", "packed"])
@pytest.mark.parametrize("where", ["merge", "unpack", "repeat", "score", "text"])
def test_an_error_in_an_evaluation_leaves_the_model_as_it_was(where: str, kind: str, adapters, monkeypatch) -> None:
    model, tokenizer = sqft.load(adapters[kind], trainable=True)
    model.train()
    next(model.children()).eval()  # modules in both modes
    set_ranks(model, dict.fromkeys(get_ranks(model), 2))
    before = state_of(model)
    layer = type(next(iter(adapter_layers(model).values())))
    if where == "merge":
        monkeypatch.setattr(layer, "merge", after(3, layer.merge))
    elif where == "unpack":
        monkeypatch.setattr(scoring, "unpack_model", broken)
    elif where == "repeat":
        from sqft.quantization.linear import QuantLinear

        monkeypatch.setattr(QuantLinear, "dequantize", after(3, QuantLinear.dequantize))
    else:
        monkeypatch.setattr(stage, "score" if where == "score" else "perplexity", broken)
    config = sqft.EvaluateConfig(task="arithmetic", limit=2, text="builtin", length=32, max_tokens=64, ranks="maximal")
    if (where, kind) != ("repeat", "float"):
        with pytest.raises(Broken):
            sqft.evaluate(model, config, tokenizer=tokenizer)
    assert_same(before, state_of(model))
    monkeypatch.undo()
    sqft.evaluate(model, config, tokenizer=tokenizer)
    assert_same(before, state_of(model))


def test_what_was_merged_before_stays_merged(adapters) -> None:
    for folder in adapters.values():
        model, _ = sqft.load(folder)
        model.merge_adapter()
        before = state_of(model)
        with evaluating(model), unpacked(model):
            pass
        assert_same(before, state_of(model))


def test_an_error_in_a_search_leaves_the_ranks_as_they_were(adapters) -> None:
    model, _ = sqft.load(adapters["float"])  # at the largest; the first to be tried is the median
    before = state_of(model)
    with pytest.raises(Broken):
        sqft.search(model, sqft.SearchConfig(evaluations=3), scorer=broken)
    assert_same(before, state_of(model))


def test_inputs_go_where_the_embedding_is(tokens) -> None:
    model = pico_model()
    model.model.embed_tokens.to("meta")
    model.lm_head = torch.nn.Linear(32, 260, bias=False)
    assert input_device(model) == torch.device("meta") and next(iter(model.lm_head.parameters())).device.type == "cpu"


@pytest.mark.parametrize("stage", ["evaluate", "search"])
def test_a_folder_is_scored_on_the_accelerator_where_there_is_one(
    stage: str, adapters, tmp_path: Path, monkeypatch
) -> None:
    given = []

    def pick(name: str) -> torch.device:
        given.append(name)
        raise Broken

    monkeypatch.setattr(folders, "pick_device", pick)
    with pytest.raises(Broken):
        if stage == "evaluate":
            sqft.evaluate(adapters["float"], sqft.EvaluateConfig(text="builtin"))
        else:
            sqft.search(adapters["float"], sqft.SearchConfig(task="arithmetic"), out=tmp_path / "out")
    assert given == ["auto"]


def test_a_frozen_head_is_not_copied_for_every_prompt() -> None:
    """torch's matmul folds the rows of a trainable weight only, or rows that lie together."""
    model = pico_model().requires_grad_(False)
    seen: list[bool] = []
    head = model.get_output_embeddings()
    pairs = [([1, 2, 3, n, 5], 2) for n in range(4, 8)]
    plain = likelihoods(model, pairs, 8)
    handle = head.register_forward_hook(lambda module, given, out: seen.append(given[0].is_contiguous()))
    again = likelihoods(model, pairs, 8)
    generate(model, pico_tokenizer(), ["one", "two"], 3, [])
    handle.remove()
    assert len(seen) == 2 + 3 and all(seen) and again == plain
    assert not head._forward_pre_hooks
