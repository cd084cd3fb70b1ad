"""`sqft compare`: every method by one recipe, resumable; and the differences of two runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_cli import call, fails

from sqft import artifact
from sqft.comparison import METHODS
from sqft.registry import KINDS

RECIPE = """
model: {model}
output: {out}
sparsify: {{samples: 4, length: 32}}
quantize: {{samples: 4, length: 32, group_size: 32}}
train: {{adapter: qa-sparse-peft, base: sparsify, task: arc_easy, limit: 8, max_steps: 3, batch_size: 4, r: 4, search_space: [4, 2]}}
search: {{task: arc_easy, limit: 4, metric: loss, evaluations: 3}}
evaluate: {{task: arc_easy, limit: 12}}
measure: {{tokens: 2, rounds: 1}}
compare: {{}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "arc_easy").mkdir()
    number = 0
    for split in ("train", "validation", "test"):
        lines = []
        for _ in range(12):
            number += 1
            choices = {"text": [f"{number}", f"{number + 1}", "none"], "label": ["A", "B", "C"]}
            lines.append(json.dumps({"question": f"What follows {number}?", "choices": choices, "answerKey": "B"}))
        (folder / "arc_easy" / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_every_method_and_again(dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.format(model=dense, out=tmp_path / "out"))
    command = ("compare", tmp_path / "r.yaml", "--data-dir", data, "--sparsity", "0.5,0.25")
    code, out, err = call(capsys, *command, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result == json.loads((tmp_path / "out" / "compare.json").read_text())
    rows = result["rows"]
    tuned = [name for name, method in METHODS.items() if method.adapter]
    assert [(row["name"], row["sparsity"]) for row in rows] == [
        ("dense", None), ("dense-lora", None),
        *((name, s) for s in (0.25, 0.5) for name in METHODS if METHODS[name].base != "model")]  # fmt: skip
    for row in rows:
        assert row["problems"] == 12 and row["size"] > 0 and row["decode_tokens_per_second"] > 0
        assert (
            (row["trainable_parameters"] is not None) == (row["name"] in tuned) == (row["train_peak_bytes"] is not None)
        )
        assert ("difference_ci95" in row) == (row["name"] != "lora")
        if row["mergeable"]:
            folder = tmp_path / "out" / row["folder"]
            method = METHODS[row["name"]]
            last = method.after or ("train" if KINDS[method.adapter].whole else "merge")
            assert artifact.read_manifest(folder).stage == last and row["sparsity_kept"] >= row["sparsity"]
            assert artifact.read_manifest(folder).metrics["zeros_kept"] == 1.0
    by_name = {row["name"]: row for row in rows if row["sparsity"] in (0.5, None)}
    assert [by_name[n]["precision"] for n in ("dense", "lora", "sparse-peft", "sqft", "qa-sparse-peft")] == [
        "FP32", "FP32 + FP32", "FP32", "INT4 + FP32", "INT4"]  # fmt: skip
    assert by_name["dense-lora"]["sparsity_kept"] is None and by_name["dense-lora"]["mergeable"] is False
    assert (
        by_name["merge-gptq"]["precision"] == "INT4" and by_name["merge-gptq"]["size"] == by_name["sparse-int4"]["size"]
    )
    merged = artifact.read_manifest(tmp_path / "out" / by_name["sparse-peft"]["folder"])  # trained and merged once
    assert artifact.read_manifest(tmp_path / "out" / by_name["merge-gptq"]["folder"]).parent_key == merged.key
    full = artifact.read_manifest(tmp_path / "out" / by_name["sparse-full"]["folder"])
    assert full.config["r"] == 32 and full.config["search_space"] == [] and full.metrics["learning_rate"] == 5e-5
    root = tmp_path / "out"
    for name in ("distilled", "distilled-full", "distilled-qa"):  # by one teacher, which the dense row is
        learnt = artifact.read_manifest(root / "s50" / name / "train").config
        assert learnt["distill"] == str(root / "dense-lora" / "train") and learnt["train_norms"] == (
            name[-4:] != "full"
        )
    assert by_name["shears"]["trainable_parameters"] == by_name["lora"]["trainable_parameters"]
    assert by_name["qa-sparse-peft"]["size"] < by_name["sqft"]["size"] < by_name["sparse-peft"]["size"]
    assert "| SQFT + QA-SparsePEFT | 50 % | yes | INT4 |" in (tmp_path / "out" / "table.md").read_text()
    # Again: nothing is run; of a folder that is gone, only what follows from it.
    err = call(capsys, *command)[2]
    assert err.count("unchanged, skipped") == len([line for line in err.splitlines() if "/out/" in line])
    shutil.rmtree(tmp_path / "out" / "s50" / "sqft" / "evaluate")
    err = call(capsys, *command)[2]
    assert [line for line in err.splitlines() if "/out/" in line and "skipped" not in line] == [
        f"{tmp_path}/out/s50/sqft/evaluate: evaluate {tmp_path}/out/s50/sqft/search"]  # fmt: skip
    # The two sparsities as two runs.
    code, out, err = call(capsys, "compare", tmp_path / "out" / "s25", tmp_path / "out" / "s50", "--json")
    assert code == 0, err
    differs = {(d["stage"], d["name"]): (d["left"], d["right"]) for d in json.loads(out)}
    assert differs[("sparsify", "option sparsity")] == ("0.25", "0.5")
    assert ("sparsify", "number zeros") in differs and not any("seconds" in name for _, name in differs)
    assert call(capsys, "compare", tmp_path / "out" / "s50", tmp_path / "out" / "s50", "--json")[1].strip() == "[]"


def test_wrong_comparisons(dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(model=dense, out=tmp_path / "out"))
    run = ("compare", recipe, "--data-dir", data)
    assert "unknown method 'loar'" in fails(capsys, 2, *run, "--methods", "loar")
    assert "sparsities is 1.5" in fails(capsys, 2, *run, "--sparsity", "0.5,1.5")
    assert "takes a recipe, or two folders" in fails(capsys, 2, "compare", "a", "b", "c")
    assert "there is no folder" in fails(capsys, 2, "compare", tmp_path / "a", tmp_path / "b")
    assert "was written by sqft" in fails(capsys, 2, "compare", tmp_path, tmp_path)
    assert "there is no recipe" in fails(capsys, 2, "compare", "arc-esy")
    assert "arc_easy/train.jsonl" in fails(capsys, 2, "compare", recipe, "--data-dir", tmp_path)
    recipe.write_text(recipe.read_text().replace("search_space: [4, 2]", "epochs: 1"))
    assert "with a search_space" in fails(capsys, 2, *run)
    recipe.write_text(
        RECIPE.format(model=dense, out=tmp_path / "out").replace("sparsify: {", "sparsify: {pattern: '2:4', ")
    )
    assert "do not go with the pattern 2:4" in fails(capsys, 2, *run, "--sparsity", "0.5")
    assert not (tmp_path / "out").exists()


def test_measure(dense: Path, capsys) -> None:
    code, out, err = call(capsys, "measure", dense, "--tokens", 2, "--rounds", 1, "--json")
    metrics = json.loads(out)
    assert code == 0 and metrics["size"] == (dense / "model.safetensors").stat().st_size, err
    assert metrics["decode_tokens_per_second"] > 0 and metrics["precision"] == "FP32"
    assert "greater than 0" in fails(capsys, 2, "measure", dense, "--tokens", 0)
