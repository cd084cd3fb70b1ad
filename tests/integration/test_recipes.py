"""The shipped recipes for GSM8K, end to end on pico models of the same architectures: only sizes are changed."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pico import pico_folder
from test_cli import call, fails

import sqft
from sqft.adapters.peft_bridge import adapter_layers
from sqft.artifact import read_manifest
from sqft.formats.checkpoint import packed_layers
from sqft.keys import MASKS
from sqft.recipe import Recipe, load_recipe, run, steps, with_adapter, with_options
from sqft.sparsity.masks import load_masks
from sqft.stages import RUN

RECIPES = {"llama-3-8b-gsm8k": "llama", "mistral-7b-v0.3-gsm8k": "mistral", "phi-3-mini-gsm8k": "phi3"}
ADAPTED = {"llama": ["down_proj", "k_proj", "q_proj", "up_proj", "v_proj"], "phi3": ["qkv_proj"]}
HELD_OUT = 256  # of train, by the task


@pytest.fixture(scope="session")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with problems like GSM8K's: 40 to train on."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "gsm8k"
    folder.mkdir()

    def lines(start: int, count: int) -> str:
        records = [{"question": f"Ann has {i} pens and buys {i % 7}. How many?",
                    "answer": f"She has {i} + {i % 7} = <<{i}+{i % 7}={i + i % 7}>>{i + i % 7}.\n#### {i + i % 7}"}
                   for i in range(start, start + count)]  # fmt: skip
        return "".join(json.dumps(record) + "\n" for record in records)

    with gzip.open(folder / "train.jsonl.gz", "wt") as stream:
        stream.write(lines(1000, 40 + HELD_OUT))
    (folder / "test.jsonl").write_text(lines(5000, 6))
    return root


def reduced(name: str, gsm8k: Path, model: Path, output: Path) -> Recipe:
    """The recipe as shipped, but for the model and what makes it long or large."""
    recipe = with_options(load_recipe(name), data_dir=str(gsm8k))
    small = {"calibration": "builtin", "samples": 4, "length": 32}
    return recipe.at(str(model), output).using(
        sparsify=replace(recipe["sparsify"], **small),
        quantize=replace(recipe["quantize"], **small, group_size=32),  # pico models are 32 wide
        train=replace(recipe["train"], max_steps=3, eval_limit=4, limit=24, batch_size=8),
        search=replace(recipe["search"], limit=6, evaluations=4),
        evaluate=replace(recipe["evaluate"], limit=2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_end_to_end(name: str, gsm8k: Path, tmp_path: Path) -> None:
    family = RECIPES[name]
    recipe = reduced(name, gsm8k, pico_folder(tmp_path / "model", family), tmp_path / "run")
    results = run(recipe)
    assert results["sparsify"]["sparsity"] == 0.5
    assert results["quantize"]["bits"] == 4 and results["quantize"]["zeros_kept"] == 1.0
    assert results["train"]["steps"] == 3 and results["train"]["duplicates_left_out"] == 0
    # One group a block: q, k and v share a rank (fused, they have one), the other modules keep theirs.
    assert results["search"]["configurations"] == 5**2 and results["search"]["evaluated"] == 4
    assert results["merge"]["zeros_kept"] == 1.0 and results["merge"]["max_logit_difference"] < 1e-4
    assert set(results) - set(recipe.configs) == {
        "evaluate/model", "evaluate/sparsify", "evaluate/quantize", "evaluate/merge"}  # fmt: skip
    assert results["evaluate/merge"]["problems"] == 2 and results["evaluate/merge"]["task"] == "gsm8k"
    adapter, _ = sqft.load(tmp_path / "run" / "train")
    leaves = sorted({path.rsplit(".", 1)[-1] for path in adapter_layers(adapter)})
    assert leaves == ADAPTED[family if family == "phi3" else "llama"]
    assert load_masks(tmp_path / "run" / "merge").keys() == load_masks(tmp_path / "run" / "sparsify").keys()
    done: list[str] = []
    run(recipe, say=done.append)
    assert len(done) == 9 and all(line.endswith("unchanged, skipped") for line in done)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["sparse-peft", "sqft", "lora"])
def test_the_other_pipelines_of_a_shipped_recipe(pipeline: str, gsm8k: Path, tmp_path: Path) -> None:
    model = pico_folder(tmp_path / "model", "phi3")
    recipe = with_adapter(reduced("phi-3-mini-gsm8k", gsm8k, model, tmp_path / "run"), pipeline)
    results = run(recipe)
    assert ("quantize" in results) == (pipeline == "sqft") and ("merge" in results) == (pipeline == "sparse-peft")
    last = "merge" if pipeline == "sparse-peft" else "search"
    assert results[f"evaluate/{last}"]["problems"] == 2
    assert (tmp_path / f"run-{pipeline}" / last / "sqft.json").is_file()


def test_run_takes_the_pipeline_as_a_flag(gsm8k: Path, dense: Path, tmp_path: Path, capsys) -> None:
    text = f"model: {dense}\noutput: {tmp_path / 'run'}\nsparsify: {{samples: 4, length: 32}}\n"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert "does not train" in fails(capsys, 2, "run", recipe, "--adapter", "lora")
    recipe.write_text(text + "train: {task: gsm8k, limit: 8, eval_limit: 2, max_steps: 1, batch_size: 4, r: 4}\n")
    message = fails(capsys, 2, "run", recipe, "--adapter", "sparse-pefd")
    assert "unknown adapter 'sparse-pefd': did you mean 'sparse-peft'" in message
    code, out, err = call(capsys, "run", recipe, "--adapter", "lora", "--data-dir", gsm8k, "--json")
    assert code == 0, err
    assert json.loads(out)["train"]["steps"] == 1 and (tmp_path / "run-lora" / "train").is_dir()


def test_another_adapter_keeps_the_recipes_merge_options(dense: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {dense}\noutput: {tmp_path / 'run'}\nsparsify: {{}}\ntrain: {{task: arithmetic}}\n"
                      "merge: {tolerance: 0.001, max_shard_size: 1GB}\n")  # fmt: skip
    chosen = with_adapter(load_recipe(recipe), "qa-sparse-peft")
    assert chosen["merge"] == sqft.MergeConfig(tolerance=0.001, max_shard_size="1GB")
    assert with_adapter(load_recipe(recipe), "lora")["merge"] is None


def test_a_tasks_name_is_taken_as_it_is(dense: Path, tmp_path: Path) -> None:
    (file := tmp_path / "recipe.yaml").write_text(f"model: {dense}\noutput: {tmp_path / 'run'}\n"
        "sparsify: {calibration: task+builtin}\ntrain: {task: 'a\\1'}\n")  # fmt: skip
    config = next(step.config for step in steps(load_recipe(file)) if step.name == "sparsify")
    assert config.calibration == "a\\1+builtin"


def test_a_teacher_and_quantization_after_merging(dense: Path, tmp_path: Path) -> None:
    text = (
        f"model: {dense}\noutput: {tmp_path / 'run'}\norder: [sparsify, train, search, merge, quantize]\n"
        "teacher: {adapter: lora, task: arithmetic, limit: 4, eval_limit: 2, max_steps: 1, r: 4, learning_rate: 0.02}\n"
        "sparsify: {samples: 4, length: 32, calibration: task+builtin}\n"
        "quantize: {samples: 4, length: 32, group_size: 32}\n"
        "train: {distill: teacher, task: arithmetic, limit: 8, eval_limit: 2, max_steps: 1, r: 4}\nmerge: {}\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    results = run(recipe)
    assert list(results) == ["teacher/train", "teacher/merge", "sparsify", "train", "merge", "quantize"]
    teacher, merged = (read_manifest(tmp_path / "run" / name) for name in ("teacher/merge", "quantize"))
    assert read_manifest(tmp_path / "run" / "sparsify").config["calibration"] == "arithmetic+builtin"
    assert read_manifest(tmp_path / "run" / "train").config["distill"] == str(tmp_path / "run" / "teacher" / "merge")
    assert merged.parent == "../merge" and merged.metrics["zeros_kept"] == 1.0 and teacher.parent == "../train"
    said: list[str] = []
    run(recipe, say=said.append)
    assert len(said) == 6 and all(line.endswith("unchanged, skipped") for line in said)
    aware = with_adapter(load_recipe(recipe), "qa-sparse-peft")  # which needs its base packed: quantize comes first
    assert aware.order == RUN and with_adapter(load_recipe(recipe), "lora")["quantize"] is None
    for wrong, message in (("order: [train, sparsify, search, merge, quantize]", "order is train, sparsify"),
                           ("order: [merge, quantise]", "order knows sparsify"),
                           ("teacher: null", "no section of that name")):  # fmt: skip
        key = wrong.partition(":")[0]
        lines = [wrong if line.startswith(key) else line for line in text.splitlines()]
        recipe.write_text("\n".join(lines).replace("teacher: null\n", ""))
        with pytest.raises(sqft.UsageError, match=message):
            load_recipe(recipe)


@pytest.mark.slow
def test_a_run_with_a_float_base_can_be_moved_and_goes_on(dense: Path, tmp_path: Path, monkeypatch) -> None:
    """Keys hash the base's key and never its path, and the adapter finds its base from where it lies."""
    text = (
        f"model: {dense}\noutput: run\nsparsify: {{samples: 4, length: 32}}\n"
        "quantize: {samples: 4, length: 32, group_size: 32}\n"
        "train: {adapter: qa-sparse-peft, base: sparsify, task: arithmetic, limit: 8, eval_limit: 2, max_steps: 2, r: 4}\n"
        "merge: {}\nevaluate: {task: arithmetic, limit: 2}\n"
    )
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    run("recipe.yaml")
    (tmp_path / "here" / "run").rename(tmp_path / "there" / "run")
    monkeypatch.chdir(tmp_path / "there")
    said: list[str] = []
    run("recipe.yaml", say=said.append)
    assert said and all("unchanged, skipped" in line for line in said)
    (tmp_path / "there" / "run" / "merge" / "model.safetensors").unlink()
    run("recipe.yaml", say=said.append)
    assert (tmp_path / "there" / "run" / "merge" / "model.safetensors").is_file()


@pytest.mark.slow
def test_rounds_on_merged_models_and_dense_int4(gsm8k: Path, tmp_path: Path) -> None:
    """Two rounds after a first merge, sparse float and dense INT4: the same zeros, the same grid."""
    pico_folder(tmp_path / "model")
    sqft.sparsify(tmp_path / "model", sqft.SparsifyConfig(method="magnitude"), out=tmp_path / "sparse")

    def turn(name: str, model: Path, output: Path) -> dict[str, dict]:
        recipe = with_options(load_recipe(name), data_dir=str(gsm8k)).at(str(model), output)
        train = replace(recipe["train"], max_steps=2, eval_limit=4, limit=16, batch_size=8, learning_rate=0.02)
        recipe = recipe.using(train=train, evaluate=replace(recipe["evaluate"], limit=1))
        if recipe["quantize"]:
            small = {"samples": 4, "length": 32, "calibration": "builtin", "group_size": 32}
            recipe = recipe.using(quantize=replace(recipe["quantize"], **small))
        results = run(recipe)
        assert results["merge"]["zeros_kept"] == 1.0 and results["merge"]["max_logit_difference"] < 1e-4
        assert "evaluate/merge" in results
        return results

    turn("again", tmp_path / "sparse", tmp_path / "one")
    results = turn("again", tmp_path / "one" / "merge", tmp_path / "two")
    assert (tmp_path / "two/merge" / MASKS).read_bytes() == (tmp_path / "sparse" / MASKS).read_bytes()
    assert results["merge"]["sparsity"] == 0.5
    turn("int4", tmp_path / "model", tmp_path / "int4")
    results = turn("again-int4", tmp_path / "int4" / "merge", tmp_path / "int4-two")
    assert results["merge"]["pruned"] == 0  # a dense model stays dense
    models = [sqft.load(tmp_path / name)[0] for name in ("int4/quantize", "int4/merge", "int4-two/merge")]
    layers = [packed_layers(model) for model in models]
    for name, layer in layers[0].items():
        for other in (layers[1][name], layers[2][name]):
            assert torch.equal(layer.scales, other.scales) and torch.equal(layer.qzeros, other.qzeros)
    assert not all(torch.equal(layer.qweight, layers[2][name].qweight) for name, layer in layers[1].items())
