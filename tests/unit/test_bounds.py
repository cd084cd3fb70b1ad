"""What configurations and headers may ask for: no more than their files have. Nothing is built, allocated or indexed first."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_folder
from safetensors.torch import load_file, save_file

import sqft
from sqft.adapters.peft_bridge import load_adapter
from sqft.config import QuantizeConfig, SparsifyConfig, TrainConfig
from sqft.errors import SqftError
from sqft.folders import load
from sqft.formats.compact import CompactReader
from sqft.models.bounds import check_config
from sqft.models.dense import load_dense, skeleton
from sqft.models.reader import SafetensorsReader
from sqft.serving.prepare import load_prepared


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model at every stage, 48 columns wide: words have bits to spare."""
    root = tmp_path_factory.mktemp("stages")
    pico_folder(root / "dense", hidden_size=48, head_dim=12, intermediate_size=96)
    sqft.sparsify(root / "dense", SparsifyConfig(method="magnitude"), out=root / "sparse")
    sqft.pack(root / "sparse", out=root / "compact")
    for name, format in (("int4", "gptq_v2"), ("tensors", "compressed-tensors")):
        sqft.quantize(root / "sparse", QuantizeConfig(method="rtn", group_size=-1, format=format), out=root / name)
    sqft.pack(root / "int4", out=root / "compact4")
    config = TrainConfig(adapter="sparse-peft", max_steps=1, r=4, batch_size=2)
    sqft.train(root / "sparse", config, [sqft.Example("1+1=", "2", "2")] * 4, out=root / "adapter")
    return root


def changed(source: Path, target: Path, tensors: Any = None, file: str = "model.safetensors", **settings: Any) -> Path:
    """A copy without its manifest, with other tensors (a function of them) and settings."""
    shutil.copytree(source, target)
    (target / "sqft.json").unlink(missing_ok=True)
    if tensors is not None:
        made = load_file(target / file)
        tensors(made)
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, target / file, {"format": "pt"})
    if settings:
        values = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**values, **settings}))
    return target


def refused(call: Any, *words: str) -> None:
    started = time.process_time()
    with pytest.raises(SqftError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text
    assert time.process_time() - started < 5


ABSURD = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 30},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": "many"},
    {"hidden_size": 10**12},
    {"hidden_size": -5},
    {"hidden_size": 4000},
    {"intermediate_size": 10**6},
    {"vocab_size": 10**9},
    {"num_attention_heads": 0},
    {"num_attention_heads": 10**9},
    {"layer_types": ["full_attention"] * 10_000},
    {"max_position_embeddings": 10**15},
    {"rope_theta": [10**9] * 5000},
    {"attn_implementation": "somebody/kernel"},
]


@pytest.mark.parametrize("settings", ABSURD, ids=str)
def test_a_configuration_that_asks_for_more_than_there_is(folders: Path, tmp_path: Path, settings: dict) -> None:
    refused(lambda: load_dense(changed(folders / "dense", tmp_path / "m", **settings)))


@pytest.mark.parametrize("stage", ["int4", "compact", "compact4", "tensors"])
@pytest.mark.parametrize("settings", ABSURD[:7:3], ids=str)
def test_a_packed_one_too(folders: Path, tmp_path: Path, stage: str, settings: dict) -> None:
    folder = changed(folders / stage, tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    (values["config"] if stage.startswith("compact") else values).update(settings)
    (folder / "config.json").write_text(json.dumps(values))
    refused(lambda: load(folder))


def test_a_configuration_without_weights(tmp_path: Path) -> None:
    """Bounded by what models have; and what they have passes."""
    for settings in ({"num_hidden_layers": 10**6}, {"hidden_size": 2**30}, {"num_experts": 10**6}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **settings}))
        refused(lambda: skeleton(tmp_path), next(iter(settings)), "expected")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3_moe", "num_hidden_layers": 1000, "num_experts": 4000})
    )
    refused(lambda: skeleton(tmp_path), "experts in all layers")
    kimi = {"num_hidden_layers": 61, "n_routed_experts": 384, "hidden_size": 7168, "vocab_size": 163840, "eos_token_id": [163585],
            "max_position_embeddings": 262144, "rope_theta": 50000.0, "pad_token_id": -1, "sliding_window": None}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(kimi))
    check_config(tmp_path)


def test_positions_of_which_a_model_would_make_a_table(tmp_path: Path) -> None:
    folder = pico_folder(tmp_path / "gpt2", "gpt2")
    refused(lambda: load_dense(changed(folder, tmp_path / "m", n_positions=10**6)))


def test_weights_that_are_missing_are_not_drawn(folders: Path, tmp_path: Path) -> None:
    def rename(tensors: dict) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[f"{name}x"] = tensors.pop(name)

    refused(
        lambda: load_dense(changed(folders / "dense", tmp_path / "m", rename)),
        "lacks model.layers.0.mlp.up_proj.weight",
    )


def test_an_index_names_files_of_its_folder(folders: Path, tmp_path: Path) -> None:
    folder = changed(folders / "dense", tmp_path / "m")
    for name in ("../other/model.safetensors", "/etc/passwd", 3):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        refused(lambda: SafetensorsReader(folder), "no file of this folder")


@pytest.mark.parametrize("length", [0, 7, 2**63, 2**40])
def test_a_header_that_is_longer_than_its_file(folders: Path, tmp_path: Path, length: int) -> None:
    folder = changed(folders / "dense", tmp_path / "m")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + data[8:])
    refused(lambda: SafetensorsReader(folder), "corrupt or truncated")


def test_a_header_whose_tensors_are_larger_than_its_file(tmp_path: Path) -> None:
    for shape, offsets, dtype in (([2**40, 2**40], [0, 8], "F32"), ([2], [0, 2**50], "F32"), ([2], [-8, 0], "F32"), ([-2], [0, 8], "F32"),
                                  ([2**62, 0], [0, 0], "F32"), ([2], [0, 8], "X9"), ([2.5], [0, 8], "F32")):  # fmt: skip
        header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        try:
            for _, tensor in SafetensorsReader(tmp_path):
                assert tensor.numel() == 0
        except SqftError as error:
            assert "\n" not in str(error)


def last_of(name: str) -> Any:
    return lambda tensors: next(key for key in tensors if key.endswith(name))


def setting(name: str, value: Any) -> Any:
    """A function that puts a value into the first tensor whose name ends so: at a place, or the whole."""

    def change(tensors: dict) -> None:
        key = last_of(name)(tensors)
        tensors[key] = value(tensors[key])

    return change


def at(place: int, value: int) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[place] = value
        return tensor

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (setting(".g_idx", at(3, 10**6)), "goes from 0 to 1000000, expected 0 to 0"),
        (setting(".g_idx", at(3, -1)), "goes from -1"),
        (setting(".g_idx", lambda t: t[:-1]), "in the checkpoint"),
        (setting(".g_idx", lambda t: t[:0]), "has 0 inputs"),
        (setting(".g_idx", lambda t: t.float()), "expected int32"),
        (setting(".qweight", lambda t: t[:-1]), "expected int32"),
        (setting(".qweight", lambda t: t.to(torch.uint8)), "expected int32"),
        (setting(".qweight", lambda t: t.flatten()), "expected 2 dimensions"),
        (setting(".qzeros", lambda t: t[:, :-1]), "expected int32"),
        (setting(".scales", lambda t: t[:, :-1]), "corrupt"),
        (setting(".scales", lambda t: t.to(torch.int8)), "expected float"),
    ],
)
def test_gptq_tensors(folders: Path, tmp_path: Path, change: Any, words: str) -> None:
    if not any(name.endswith(".g_idx") for name in load_file(folders / "int4" / "model.safetensors")):
        pytest.fail("the checkpoint has no g_idx")
    refused(lambda: load(changed(folders / "int4", tmp_path / "m", change)), words)


@pytest.mark.parametrize("key, value", [("bits", 0), ("bits", 10**9), ("bits", "4"), ("bits", [4]), ("group_size", 0), ("group_size", -7),
                                        ("group_size", 10**12), ("group_size", "x"), ("group_size", None), ("dynamic", 3),
                                        ("checkpoint_format", {}), ("quant_method", ["gptq"])])  # fmt: skip
def test_gptq_settings(folders: Path, tmp_path: Path, key: str, value: Any) -> None:
    values = json.loads((folders / "int4" / "config.json").read_text())["quantization_config"]
    refused(lambda: load(changed(folders / "int4", tmp_path / "m", quantization_config={**values, key: value})))


def test_compressed_tensors(folders: Path, tmp_path: Path) -> None:
    values = json.loads((folders / "tensors" / "config.json").read_text())["quantization_config"]
    for number, groups in enumerate(({}, [], 3, {"a": 3}, {"a": {"weights": 3}}, {"a": {"weights": {"type": "int"}}})):
        folder = changed(
            folders / "tensors", tmp_path / f"{number}", quantization_config={**values, "config_groups": groups}
        )
        refused(lambda folder=folder: load(folder))
    for number, shape in enumerate(([-1, 48], [48, 0], [2**40, 2**40], [48], [48, 47])):
        change = setting(".weight_shape", lambda t, shape=shape: torch.tensor(shape))
        folder = changed(folders / "tensors", tmp_path / f"s{number}", change)
        refused(lambda folder=folder: load(folder))


@pytest.mark.parametrize("stage", ["compact", "compact4"])
def test_compact_tensors(folders: Path, tmp_path: Path, stage: str) -> None:
    """Masks with bits beyond the last column, or more of them than values, shapes of another weight: the kernels would read
    beyond what is stored."""
    changes = {
        "beyond": setting(".compact_mask", lambda t: t | torch.tensor(1 << 62)),
        "all": setting(".compact_mask", lambda t: torch.full_like(t, -1)),
        "none": setting(".compact_mask", torch.zeros_like),
        "short": setting(".compact_values", lambda t: t[:-1]),
        "kind": setting(".compact_values", lambda t: t.to(torch.int32)),
        "deep": setting(".compact_values", lambda t: t[:, None]),
        "shape": setting(".compact_shape", lambda t: t * 2),
        "negative": setting(".compact_shape", lambda t: -t),
        "zero": setting(".compact_shape", lambda t: t * 0),
        "three": setting(".compact_shape", lambda t: torch.cat([t, t])),
        "words": setting(".compact_mask", lambda t: t.int()),
    }
    if stage == "compact4":
        changes |= {
            "scales": setting(".scales", lambda t: t[:, :-1]),
            "integers": setting(".scales", lambda t: t.int()),
        }
    for name, change in changes.items():
        folder = changed(folders / stage, tmp_path / name, change)
        for use in (load, load_prepared):
            refused(lambda use=use, folder=folder: use(folder))


def test_compact_configuration(folders: Path, tmp_path: Path) -> None:
    for number, settings in enumerate(({"config": None}, {"config": []}, {"version": 9}, {"version": None})):
        folder = changed(folders / "compact", tmp_path / str(number), **settings)
        refused(lambda folder=folder: CompactReader(folder))


@pytest.mark.parametrize("change", [lambda t: t.float(), lambda t: t[:-1], lambda t: t.int(), lambda t: t.flatten()])
def test_masks(folders: Path, tmp_path: Path, change: Any) -> None:
    made = changed(folders / "sparse", tmp_path / "m", setting("q_proj", change), "masks/masks.safetensors")
    refused(lambda: load(made), "mask")


def test_bits_beyond_a_masks_columns(tmp_path: Path) -> None:
    """``pack`` would count them, and the kernels read values that are not there."""
    from torch import nn

    from sqft.sparsity.masks import attach_masks

    model = nn.Sequential(nn.Linear(20, 4))
    attach_masks(model, {"0": torch.full((4, 3), 15, dtype=torch.uint8)})
    refused(lambda: attach_masks(model, {"0": torch.full((4, 3), 255, dtype=torch.uint8)}), "does not fit")


def test_positions_of_a_packed_models_mask(folders: Path, tmp_path: Path) -> None:
    masks = load_file(folders / "int4" / "masks" / "masks.safetensors")
    name = next(iter(masks))
    for number, positions in enumerate(([-1], [2**31 - 1], [[0]])):

        def change(tensors: dict, positions: Any = positions) -> None:
            tensors[name] = torch.tensor(positions, dtype=torch.int32)

        folder = changed(folders / "int4", tmp_path / str(number), change, "masks/masks.safetensors")
        refused(lambda folder=folder: load(folder), "mask")


@pytest.mark.parametrize("settings", [{"r": 10**9}, {"rank_pattern": {"q_proj": 10**9}}, {"base_model_name_or_path": 3},
                                      {"base_model_name_or_path": "x" * 400}, {"peft_type": []}])  # fmt: skip
def test_adapters(folders: Path, tmp_path: Path, settings: dict) -> None:
    folder = changed(folders / "adapter", tmp_path / "a")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**values, "base_model_name_or_path": str(folders / "sparse"), **settings})
    )
    refused(lambda: load(folder))


def test_an_adapter_that_is_a_pickle(folders: Path, tmp_path: Path) -> None:
    folder = changed(folders / "adapter", tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(lambda: load_adapter(load_dense(folders / "dense"), folder), "another kind of file is not loaded")
