"""What may be put on a base, by whatever door it comes, and the handle on elastic ranks."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import EvaConfig, KasaConfig, LoraConfig, LoraRuntimeConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, CordaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from pico import pico_model
from safetensors.torch import load_file, save_file

import sqft
from sqft.adapters.groups import make_groups
from sqft.adapters.peft_bridge import adapter_layers, is_masked
from sqft.adapters.sparse import give_mask
from sqft.elastic.handle import Elastic
from sqft.quantization.linear import QuantLinear
from sqft.registry import KINDS
from sqft.sparsity.masks import mask_of

TARGETS = ["q_proj", "up_proj"]


@pytest.fixture(scope="module")
def packed(sparse: Path, tokens, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    sqft.quantize(sparse, sqft.QuantizeConfig(group_size=32), tokens, out=out)
    return out


@torch.no_grad()
def logits(model, tokens) -> torch.Tensor:
    return model.eval()(input_ids=tokens).logits


REWRITE: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"},
    {"init_lora_weights": "corda", "corda_config": CordaConfig()}, {"kasa_config": KasaConfig()},
    {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
]  # fmt: skip
IGNORED: list[dict[str, Any]] = [
    {"init_lora_weights": "eva", "eva_config": EvaConfig()}, {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"}, {"use_dora": True}, {"lora_bias": True}, {"fan_in_fan_out": True},
    {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, {"velora_config": VeloraConfig()},
    {"monteclora_config": MontecloraConfig()}, {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"])},
    {"arrow_config": ArrowConfig()}, {"use_qalora": True}, {"target_parameters": ["experts.up"]},
    {"layer_replication": [(0, 1)]}, {"megatron_config": {"a": 1}},
    {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
]  # fmt: skip


@pytest.mark.parametrize("options", REWRITE, ids=lambda o: str(next(iter(o.values())))[:12])
def test_initialisations_that_rewrite_the_base_are_refused(options: dict, sparse: Path, packed: Path) -> None:
    with pytest.raises(sqft.UsageError, match="rewrites the base"):
        sqft.SqftConfig(**options)
    for folder in (sparse, packed):
        model, _ = sqft.load(folder)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for config in (LoraConfig(**options), sqft.SqftConfig(sparse_adapter=False, **options)):
            with pytest.raises(sqft.UsageError, match="rewrites the base"):
                sqft.attach(model, config)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_plain_lora_on_a_dense_model_may_rewrite_it(dense: Path) -> None:
    assert sqft.attach(sqft.load(dense)[0], LoraConfig(init_lora_weights="pissa", r=4))


@pytest.mark.parametrize("options", IGNORED, ids=lambda o: next(iter(o)))
def test_lora_options_that_would_be_ignored_are_refused_by_name(options: dict, packed: Path) -> None:
    with pytest.raises(sqft.UsageError, match=next(iter(options))):
        sqft.SqftConfig(**options)
    with pytest.raises(sqft.UsageError, match=next(iter(options))):  # set where no constructor sees it
        config = sqft.SqftConfig(quantization_aware=True, target_modules=TARGETS)
        for name, value in options.items():
            setattr(config, name, value)
        get_peft_model(sqft.load(packed)[0], config)


def test_attach_honours_peft_options_and_keeps_the_callers_config(sparse: Path) -> None:
    config = sqft.SqftConfig(r=4, target_modules=TARGETS, layers_to_transform=[1], exclude_modules=["up_proj"],
                             rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6})  # fmt: skip
    before = {name: repr(value) for name, value in vars(config).items()}
    for _ in range(2):
        layers: dict[str, Any] = dict(adapter_layers(sqft.attach(sqft.load(sparse)[0], config)))
        assert list(layers) == ["model.layers.1.self_attn.q_proj"]
        assert layers["model.layers.1.self_attn.q_proj"].scaling["default"] == 3.0
    assert before == {name: repr(value) for name, value in vars(config).items()}
    config = sqft.SqftConfig(search_space=[4, 2], target_modules=["*.0.*.q_proj"])
    sqft.attach(sqft.load(sparse)[0], config)
    assert config.r == 8 and config.target_modules == {"*.0.*.q_proj"}
    with pytest.raises(sqft.UsageError, match="no target module is left"):
        sqft.attach(sqft.load(sparse)[0], sqft.SqftConfig(layers_to_transform=[7]))
    with pytest.raises(sqft.UsageError, match="rank_pattern does not go with a search_space"):
        sqft.SqftConfig(search_space=[4, 2], rank_pattern={"q_proj": 2})


def test_all_linear_and_regular_expressions(sparse: Path) -> None:
    for name in ("all-linear", ["all"]):
        model = sqft.attach(sqft.load(sparse)[0], sqft.SqftConfig(target_modules=name))
        assert len(adapter_layers(model)) == 14
    with pytest.raises(sqft.UsageError, match=r"regular expression.*list.*write 'all'"):
        sqft.attach(sqft.load(sparse)[0], sqft.SqftConfig(target_modules=r".*\.(q|v)_proj"))


def test_masked_adapters_on_a_dense_model_are_refused_at_every_door(dense: Path, sparse: Path, tmp_path: Path) -> None:
    config = sqft.SqftConfig(target_modules=TARGETS, task_type="CAUSAL_LM")
    get_peft_model(sqft.load(sparse)[0], config).save_pretrained(str(tmp_path))
    with pytest.raises(sqft.SqftError, match="q_proj is not sparse"):
        get_peft_model(sqft.load(dense)[0], config)  # as TRL does with peft_config
    with pytest.raises(sqft.SqftError, match="q_proj is not sparse"):
        PeftModel.from_pretrained(sqft.load(dense)[0], str(tmp_path))
    with pytest.raises(sqft.SqftError, match="not sparse"):
        sqft.attach(sqft.load(dense)[0], config)
    model = get_peft_model(sqft.load(sparse)[0], config)
    with pytest.raises(sqft.SqftError, match="lm_head is not sparse"):
        model.add_adapter("head", sqft.SqftConfig(target_modules=["lm_head"]))
    with pytest.raises(sqft.SqftError, match=r"embed_tokens is a Embedding.*torch\.nn\.Linear"):
        model.add_adapter("table", sqft.SqftConfig(target_modules=["embed_tokens"]))


def test_a_float_base_that_is_not_there_is_an_error_at_every_door(sparse: Path, packed: Path) -> None:
    config = sqft.SqftConfig(quantization_aware=True, target_modules=TARGETS, float_base=str(sparse))
    with pytest.raises(sqft.SqftError, match="float base of 'default' is not beside"):
        get_peft_model(sqft.load(packed)[0], config)
    model = sqft.attach(sqft.load(packed)[0], config)
    with pytest.raises(sqft.SqftError, match="float base of 'second'"):
        model.add_adapter("second", sqft.SqftConfig(quantization_aware=True, target_modules=TARGETS))
    again = sqft.attach(model.unload(), sqft.SqftConfig(quantization_aware=True))  # its base holds none any more
    assert not any(hasattr(layer.get_base_layer(), "sqft_float_base") for layer in adapter_layers(again).values())


def test_the_mask_of_a_dense_int_layer_is_made_where_its_weight_lies() -> None:
    layer = QuantLinear(32, 16, 4, 32, device="meta")
    give_mask(layer, sparse=False)
    assert layer.sqft_mask.device.type == "meta"
    layer = QuantLinear(30, 16, 4, 30)
    give_mask(layer, sparse=False)
    mask = mask_of(layer)
    assert mask is not None and mask.all() and mask.shape == (16, 30)


def test_only_missing_and_unexpected_keys_make_an_adapter_corrupt(sparse: Path, tokens, tmp_path: Path) -> None:
    """PEFT warns of many things, e.g. of options that a later version wrote."""
    adapted = sqft.attach(sqft.load(sparse)[0], sqft.SqftConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path))
    file, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_a_later_version": 1}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded, _ = sqft.load(tmp_path)
    assert any("from_a_later_version" in str(warning.message) for warning in caught)
    assert torch.equal(logits(loaded, tokens), logits(adapted, tokens))
    state = load_file(weights)
    name = next(key for key in state if "q_proj" in key)
    save_file({key: value for key, value in state.items() if key != name}, weights)
    with pytest.raises(sqft.SqftError, match="corrupt: it lacks"):
        sqft.load(tmp_path)
    save_file({**state, name.replace("q_proj", "o_proj"): state[name].clone()}, weights)
    with pytest.raises(sqft.SqftError, match=r"corrupt: it has beside its base .*o_proj"):
        sqft.load(tmp_path)


@pytest.mark.slow
def test_a_run_with_a_float_base_can_be_moved(sparse: Path, packed: Path, examples, tokens, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(sparse, run / "sparse")
    sqft.quantize(run / "sparse", sqft.QuantizeConfig(group_size=32), tokens, out=run / "packed")
    config = sqft.TrainConfig(adapter="qa-sparse-peft", base=str(run / "sparse"), max_steps=2, batch_size=2, r=2)
    sqft.train(run / "packed", config, examples, out=run / "adapter")
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["float_base"] == "../sparse"
    before = logits(sqft.load(run / "adapter")[0], tokens)
    (tmp_path / "elsewhere").mkdir()
    run = run.rename(tmp_path / "elsewhere" / "moved")
    assert torch.equal(logits(sqft.load(run / "adapter")[0], tokens), before)
    assert sqft.merge(run / "adapter", out=run / "merged")["zeros_kept"] == 1.0


def test_what_is_trained_is_what_is_merged_in_half_precision(sparse: Path) -> None:
    """Bit for bit in evaluation and in training without dropout; with dropout two rounded products are summed."""
    model, _ = sqft.load(sparse, dtype="bfloat16")
    peft_model = sqft.attach(model, sqft.SqftConfig(r=4, lora_dropout=0.5, init_lora_weights=False))
    layer: Any = next(iter(adapter_layers(peft_model).values()))
    x, weight = torch.randn(8, 32, dtype=torch.bfloat16), layer.merged_weight("default")
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), F.linear(x, weight))
        layer.train().lora_dropout["default"].p = 1e-9  # drops nothing, but takes the way of dropout
        near = layer(x)
    torch.testing.assert_close(near, F.linear(x, weight), atol=0.1, rtol=0.1)
    assert not torch.equal(near, F.linear(x, weight))


def test_setting_ranks_of_a_merged_adapter_is_refused(sparse: Path, tokens) -> None:
    model = sqft.attach(sqft.load(sparse)[0], sqft.SqftConfig(search_space=[4, 2], init_lora_weights=False))
    base = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    smallest = {group.name: 2 for group in Elastic(model).groups}
    with pytest.raises(sqft.UsageError, match="merged into its base: unmerge it"):
        sqft.set_ranks(model, smallest)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, base[name], atol=1e-6, rtol=0)
    sqft.set_ranks(model, smallest)


def test_the_elastic_handle(sparse: Path, tokens) -> None:
    model = sqft.attach(sqft.load(sparse)[0], sqft.SqftConfig(search_space=[4, 2], init_lora_weights=False))
    handle = Elastic(model)
    largest, smallest = ({group.name: group.choices[i] for group in handle.groups} for i in (0, -1))
    whole = logits(model, tokens)
    with handle.at(smallest):
        assert handle.get() == sqft.get_ranks(model) == smallest
        part = logits(model, tokens)
    assert handle.get() == largest and torch.equal(logits(model, tokens), whole) and not torch.equal(whole, part)
    with pytest.raises(RuntimeError), handle.at(smallest):
        raise RuntimeError
    assert handle.get() == largest
    state = handle.slice(smallest)
    assert sum(tensor.numel() for tensor in state.values()) == handle.space.parameters(smallest)
    assert handle.get() == largest and all(tensor.is_contiguous() for tensor in state.values())
    with pytest.raises(sqft.UsageError, match="is not a choice"):
        handle.slice({handle.groups[0].name: 3})
    fixed = Elastic(sqft.attach(sqft.load(sparse)[0], sqft.SqftConfig(r=2)))
    assert fixed.groups == () and fixed.get() == {}
    fixed.set()
    with pytest.raises(sqft.UsageError, match="rank is fixed"):
        _ = fixed.space


def test_an_elastic_config_that_attach_has_not_seen_needs_its_rank(sparse: Path) -> None:
    with pytest.raises(sqft.UsageError, match="r is 8 and the largest rank of search_space 4"):
        get_peft_model(sqft.load(sparse)[0], sqft.SqftConfig(search_space=[4, 2], target_modules=TARGETS))


PLUGIN = '''
import torch, torch.nn.functional as F
from sqft.adapters.kinds import Kind
from sqft.adapters.lora import factors
from sqft.adapters.sparse import MaskedLoraLinear
from sqft.sparsity.masks import mask_of

class Doubled(MaskedLoraLinear):
    """W + 2 s M o (B A)."""
    def _adapted(self, x, adapter, dropout):
        return F.linear(x, self.merged_weight(adapter), self.get_base_layer().bias)
    def merged_weight(self, adapter, sign=1.0):
        a, b = factors(self, adapter)
        base = self.get_base_layer()
        return base.weight + sign * 2 * self.scaling[adapter] * (b @ a) * mask_of(base)

DOUBLED = Kind("doubled", "twice the adapter", "their_kind:Doubled", masked=True, merges=True)
'''


@pytest.mark.slow
def test_another_package_adds_a_kind(sparse: Path, examples, tokens, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "site" / "theirs-1.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "their_kind.py").write_text(PLUGIN)
    (tmp_path / "site" / "theirs-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: theirs\nVersion: 1\n"
    )
    (tmp_path / "site" / "theirs-1.dist-info" / "entry_points.txt").write_text(
        "[sqft.adapter_kinds]\ndoubled = their_kind:DOUBLED\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    KINDS.__dict__.pop("_plugins", None)
    try:
        config = sqft.TrainConfig(adapter="doubled", max_steps=3, batch_size=4, r=4, learning_rate=0.02)
        sqft.train(sparse, config, examples, out=tmp_path / "adapter")
        model, _ = sqft.load(tmp_path / "adapter")
        layers = adapter_layers(model).values()
        assert {type(layer).__name__ for layer in layers} == {"Doubled"} and is_masked(model)
        assert sqft.merge(tmp_path / "adapter", out=tmp_path / "merged")["zeros_kept"] == 1.0
        torch.testing.assert_close(logits(sqft.load(tmp_path / "merged")[0], tokens), logits(model, tokens))
        with pytest.raises(sqft.SqftError, match="kind sparse-peft cannot stand beside one of kind doubled"):
            model.add_adapter("ours", sqft.SqftConfig(target_modules=TARGETS))
    finally:
        KINDS.__dict__.pop("_plugins", None)
        sys.modules.pop("their_kind", None)


def test_kinds_are_told_by_name_and_by_flags() -> None:
    by_name = [sqft.SqftConfig(kind=name) for name in KINDS if not KINDS[name].whole]
    flags = [(config.sparse_adapter, config.quantization_aware, config.is_sqft) for config in by_name]
    assert flags == [(True, False, True), (True, True, True), (False, False, False), (False, False, False),
                     (False, True, True)]  # fmt: skip
    assert not sqft.SqftConfig(kind="qa-sparse-peft", sparse_adapter=False).sparse_adapter  # of a dense INT model
    with pytest.raises(sqft.UsageError, match="unknown adapter 'sparse-left'"):
        sqft.SqftConfig(kind="sparse-left")
    plain = sqft.attach(pico_model(), sqft.SqftConfig(kind="lora"))
    assert all(type(layer).__module__.startswith("peft.") for layer in adapter_layers(plain).values())


def test_the_documented_form_of_a_rank_group_is_the_one_that_is_read() -> None:
    assert "'NAME+NAME=32/16'" in str(make_groups.__doc__)
    names = ["model.layers.0.q_proj", "model.layers.0.k_proj"]
    (group,) = make_groups(names, ["q_proj+k_proj=32/16"], [8])
    assert group.choices == (32, 16) and group.modules == tuple(names)
