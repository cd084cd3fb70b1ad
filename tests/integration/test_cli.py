"""The command line as a user types it: results, errors and their exit codes, interruptions, full disks."""

from __future__ import annotations

import json
import os
import pkgutil
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pico import pico_folder
from safetensors.torch import load_file, save_file
from support.manifest import edit

import sqft.cli
from sqft.recipe import load_recipe, shipped_recipes

SQFT = [sys.executable, "-m", "sqft.cli"]
FAST = ["--samples", "4", "--length", "32"]
TRAIN = [
    "--task",
    "arithmetic",
    "--limit",
    "16",
    "--eval-limit",
    "4",
    "--max-steps",
    "3",
    "--batch-size",
    "4",
    "--r",
    "4",
]


def call(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """Runs the CLI in this process: (exit code, standard output, standard error)."""
    code = sqft.cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys: pytest.CaptureFixture, code: int, *arguments: object) -> str:
    """Asserts that the call fails with that exit code and one message without a traceback; returns the message."""
    got, _, err = call(capsys, *arguments)
    assert got == code, err
    message = [line for line in err.splitlines() if line.startswith("sqft: ")]
    assert len(message) == 1 and "Traceback" not in err and "(unexpected;" not in err, err
    return message[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_all_stages(dense: Path, tmp_path: Path, capsys) -> None:
    sparse, adapter, merged = tmp_path / "sparse", tmp_path / "adapter", tmp_path / "merged"
    code, out, _ = call(capsys, "sparsify", dense, sparse, *FAST, "--pattern", "2:4", "--json")
    assert code == 0 and json.loads(out)["sparsity"] == 0.5
    code, out, _ = call(
        capsys, "train", sparse, adapter, *TRAIN, "--target-modules", "q_proj", "v_proj", "--tensorboard"
    )
    assert code == 0 and "eval loss" in out
    code, out, _ = call(capsys, "train", sparse, tmp_path / "lora", *TRAIN, "--adapter", "lora", "--packing", "--json")
    assert code == 0 and json.loads(out)["steps"] == 3
    assert (adapter / "training_log.jsonl").is_file() and list(adapter.glob("events.*"))
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert {name.rsplit(".", 1)[1] for name in targets} == {"q_proj", "v_proj"} and len(targets) == 4
    code, out, _ = call(capsys, "merge", adapter, merged, "--json")
    assert code == 0 and json.loads(out)["zeros_kept"] == 1.0
    code, out, _ = call(capsys, "evaluate", merged, "--task", "arithmetic", "--limit", 3, "--text", "builtin", "--length",
                        64, "--max-tokens", 200, "--out", tmp_path / "scores", "--json")  # fmt: skip
    scores = json.loads(out)
    assert code == 0 and scores["problems"] == 3 and scores["perplexity"] > 1
    assert len((tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()) == 3
    code, out, _ = call(capsys, "ls", tmp_path, "--json")
    assert code == 0 and {f["stage"] for f in json.loads(out)} == {"sparsify", "train", "merge", "evaluate"}
    code, out, _ = call(capsys, "ls", tmp_path)
    assert code == 0 and "zeros kept 100.000 %" in out


def test_recipe_runs_skips_and_redoes(dense: Path, tmp_path: Path, capsys) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"q": f"{i}+1", "a": str(i + 1)}) + "\n" for i in range(16)))
    recipe = tmp_path / "recipe.yaml"
    text = (
        f"model: {dense}\noutput: {tmp_path / 'run'}\nsparsify: {{samples: 4, length: 32}}\n"
        f"train: {{data: {data}, prompt: 'Q: {{q}}\\nA:', completion: ' {{a}}', max_steps: 2, batch_size: 4, r: 4}}\n"
        "merge:\nevaluate: {task: arithmetic, limit: 2}\n"
    )
    recipe.write_text(text)
    code, out, err = call(capsys, "run", recipe)
    assert code == 0 and "100.000 %" in out and "skipped" not in err
    assert "| merge |" in (tmp_path / "run" / "table.md").read_text()
    before = snapshot(tmp_path / "run")
    code, _, err = call(capsys, "run", recipe)
    assert code == 0 and err.count("unchanged, skipped") == 6
    assert snapshot(tmp_path / "run") == before
    # A changed option redoes its stage and what follows, not what precedes.
    recipe.write_text(text.replace("max_steps: 2", "max_steps: 3"))
    _, _, err = call(capsys, "run", recipe)
    assert err.count("unchanged, skipped") == 3
    # So does changed data under the same name, and a damaged file.
    data.write_text(data.read_text().replace("7", "9"))
    assert call(capsys, "run", recipe)[2].count("unchanged, skipped") == 3
    (tmp_path / "run" / "merge" / "model.safetensors").write_bytes(b"short")
    _, _, err = call(capsys, "run", recipe)
    assert "truncated" in err and err.count("unchanged, skipped") == 5
    # A single byte, with its size and time as they were: of weights, of a file that is not read here, of the manifest.
    for file in ("merge/model.safetensors", "sparsify/masks/masks.safetensors", "merge/generation_config.json",
                 "train/adapter_config.json", "merge/sqft.json"):  # fmt: skip
        flip(tmp_path / "run" / file)
        _, _, err = call(capsys, "run", recipe)
        assert "chang" in err or "corrupt" in err, (file, err)
        assert "doing so" in err and "skipped" in err
        assert call(capsys, "run", recipe)[2].count("unchanged, skipped") == 6


def flip(file: Path) -> None:
    """Changes a byte in the middle."""
    found, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def test_verify_says_what_is_wrong_and_how_to_repair_it(dense: Path, tmp_path: Path, capsys) -> None:
    sparse, adapter = tmp_path / "sparse", tmp_path / "adapter"
    assert call(capsys, "sparsify", dense, sparse, *FAST)[0] == 0
    assert call(capsys, "train", sparse, adapter, *TRAIN)[0] == 0
    code, out, _ = call(capsys, "verify", adapter, "--deep")
    assert code == 0 and out.count("as written") == 2 and "pruned ones are zero" in out and "its probe" in out
    (adapter / "README.md").write_text("mine")  # a README may be edited
    assert call(capsys, "verify", adapter, "--json")[0] == 0
    config = json.loads((sparse / "config.json").read_text())
    flip(sparse / "config.json")
    assert "config.json was changed since it was written" in fails(capsys, 1, "evaluate", sparse, "--text", "builtin")
    assert "config.json was changed" in fails(capsys, 1, "train", sparse, tmp_path / "other", *TRAIN)
    assert "config.json was changed" in fails(capsys, 1, "merge", adapter, tmp_path / "merged")
    code, out, err = call(capsys, "verify", adapter, "--deep", "--json")
    assert code == 1 and "sqft verify" in err and "--accept" in err and json.loads(out)[1]["problems"]
    (sparse / "config.json").write_text(json.dumps(config | {"note": "mine"}))
    assert call(capsys, "verify", sparse, "--accept")[0] == 0
    assert "it has changed since" in fails(capsys, 1, "merge", adapter, tmp_path / "merged")  # another base from now on
    assert "it has changed since" in call(capsys, "verify", adapter, "--deep")[2]
    shutil.rmtree(adapter)
    assert "was not written by sqft" in fails(capsys, 2, "verify", dense)
    weights = load_file(sparse / "model.safetensors")
    name = next(name for name in weights if "q_proj.weight" in name)
    save_file({**weights, name: torch.ones_like(weights[name])}, sparse / "model.safetensors", {"format": "pt"})
    code, _, err = call(capsys, "verify", sparse, "--accept")
    assert code == 1 and f"pruned weights of {name.removesuffix('.weight')} are not zero" in err


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_parse(name: str) -> None:
    assert load_recipe(name).output


def test_help_lists_every_option(capsys) -> None:
    for command in ("sparsify", "train", "merge", "evaluate", "run", "demo", "ls"):
        with pytest.raises(SystemExit) as stop:
            sqft.cli.main([command, "--help"])
        assert stop.value.code == 0
        assert "--json" in capsys.readouterr().out


def test_wrong_usage(dense: Path, sparse: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert "did you mean 'wanda'" in fails(capsys, 2, "sparsify", dense, out, "--method", "wnada")
    assert "did you mean '--sparsity'" in fails(capsys, 2, "sparsify", dense, out, "--sparsty", "0.5")
    assert "did you mean 'sparsify'" in fails(capsys, 2, "sparsyfy", dense, out)
    for ratio in ("0", "1", "1.5", "-0.1"):
        assert "sparsity is" in fails(capsys, 2, "sparsify", dense, out, f"--sparsity={ratio}")
    assert "not a number" in fails(capsys, 2, "sparsify", dense, out, "--sparsity", "half")
    assert "is not N:M" in fails(capsys, 2, "sparsify", dense, out, "--pattern", "4:2")
    assert "does not divide" in fails(capsys, 2, "sparsify", dense, out, "--pattern", "2:5", *FAST)
    assert "matches no module: did you mean 'down_proj'" in fails(
        capsys, 2, "sparsify", dense, out, "--overrides", "dwn_proj=0.4"
    )
    assert "PATTERN=NUMBER" in fails(capsys, 2, "sparsify", dense, out, "--overrides", "down_proj")
    assert "matches no module" in fails(capsys, 2, "sparsify", dense, out, "--exclude", "lm_head")
    assert "no file" in fails(capsys, 2, "sparsify", dense, out, "--calibration", tmp_path / "none.txt")
    assert "did you mean 'q_proj'" in fails(capsys, 2, "train", sparse, out, *TRAIN, "--target-modules", "q_poj")
    assert "unknown task 'arithmetik': did you mean 'arithmetic'" in fails(
        capsys, 2, "train", sparse, out, "--task", "arithmetik"
    )
    assert "nothing to train on" in fails(capsys, 2, "train", sparse, out)
    assert "unknown adapter" in fails(capsys, 2, "train", sparse, out, "--adapter", "sparsepeft")
    assert "exclude each other" in fails(capsys, 2, "train", sparse, out, "--task", "arithmetic", "--data", "x.jsonl")
    assert "nothing to evaluate" in fails(capsys, 2, "evaluate", sparse)
    assert "no split 'tset'" in fails(capsys, 2, "evaluate", sparse, "--task", "arithmetic", "--split", "tset")
    assert "not an adapter" in fails(capsys, 2, "merge", sparse, out)
    assert "unexpected argument" in fails(capsys, 2, "ls", tmp_path, "more")
    assert "no recipe" in fails(capsys, 2, "run", "demmo")
    assert not out.exists() and not list(tmp_path.iterdir())


def test_fused_modules_say_their_name(tmp_path: Path, capsys) -> None:
    pico_folder(tmp_path / "phi3", "phi3")
    call(capsys, "sparsify", tmp_path / "phi3", tmp_path / "sparse", *FAST)
    message = fails(capsys, 2, "train", tmp_path / "sparse", tmp_path / "out", *TRAIN, "--target-modules", "q_proj")
    assert "'qkv_proj'" in message


def test_wrong_models(dense: Path, sparse: Path, trained: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert "there is no folder" in fails(capsys, 2, "sparsify", tmp_path / "none", out)
    (tmp_path / "empty").mkdir()
    assert "not a model folder" in fails(capsys, 2, "sparsify", tmp_path / "empty", out)
    assert "cannot load" in fails(capsys, 1, "sparsify", "owner/no-such-model", out)
    assert "not sparse" in fails(capsys, 1, "train", dense, out, *TRAIN)
    broken = tmp_path / "broken"
    shutil.copytree(dense, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "corrupt or truncated" in fails(capsys, 1, "sparsify", broken, out)
    (broken / "model.safetensors").write_bytes(b"\xff" * 64 + data[64:])
    assert "corrupt or truncated" in fails(capsys, 1, "sparsify", broken, out)
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1')
    assert "index.json is corrupt or truncated" in fails(capsys, 1, "sparsify", broken, out)
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert "lacks model-00001-of-00002.safetensors" in fails(capsys, 1, "sparsify", broken, out)
    (broken / "config.json").write_text("{")
    (broken / "model.safetensors.index.json").unlink()
    (broken / "model.safetensors").write_bytes(data)
    assert "config.json cannot be read" in fails(capsys, 1, "sparsify", broken, out)
    cut = tmp_path / "cut"
    shutil.copytree(sparse, cut)
    masks = cut / "masks" / "masks.safetensors"
    masks.write_bytes(masks.read_bytes()[:-3])
    assert "truncated or changed" in fails(capsys, 1, "evaluate", cut, "--text", "builtin")
    assert not out.exists()


def test_adapter_and_base_have_to_belong_together(trained: Path, sparse: Path, tmp_path: Path, capsys, tokens) -> None:
    """An adapter beside a base that was made anew differently, another model's adapter, a base that is gone."""
    import sqft as api

    shutil.copytree(sparse, tmp_path / "sparse")
    shutil.copytree(trained, tmp_path / "adapter")
    edit(tmp_path / "adapter", parent="../sparse")
    assert call(capsys, "merge", tmp_path / "adapter", tmp_path / "fits")[0] == 0
    api.sparsify(sparse, api.SparsifyConfig(sparsity=0.7), tokens, out=tmp_path / "sparse", overwrite=True)
    assert "it has changed since" in fails(capsys, 1, "merge", tmp_path / "adapter", tmp_path / "out")
    shutil.rmtree(tmp_path / "sparse")
    assert "is gone" in fails(capsys, 1, "merge", tmp_path / "adapter", tmp_path / "out")
    pico_folder(tmp_path / "other", "opt")
    (tmp_path / "adapter" / "sqft.json").unlink()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "other")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert "does not fit" in fails(capsys, 1, "merge", tmp_path / "adapter", tmp_path / "out")


def test_outputs_are_protected(dense: Path, sparse: Path, tmp_path: Path, capsys) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert "already holds something" in fails(capsys, 2, "sparsify", dense, mine, *FAST)
    assert "not written by sqft" in fails(capsys, 2, "sparsify", dense, mine, *FAST, "--overwrite")
    assert "is a file" in fails(capsys, 2, "sparsify", dense, mine / "thesis.txt", *FAST)
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert call(capsys, "sparsify", dense, tmp_path / "out", *FAST)[0] == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "already holds" in fails(capsys, 2, "sparsify", dense, tmp_path / "out", *FAST)
    assert call(capsys, "sparsify", dense, tmp_path / "out", *FAST, "--sparsity", "0.7", "--overwrite")[0] == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


def test_recipe_errors_name_the_line(tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"

    def message(text: str) -> str:
        recipe.write_text(text)
        return fails(capsys, 2, "run", recipe)

    head = "model: m\noutput: o\n"
    assert "recipe.yaml:4: unknown option 'sparsty' of sparsify: did you mean 'sparsity'" in message(
        head + "sparsify:\n  sparsty: 0.5\n"
    )
    assert "recipe.yaml:3: unknown key 'sparsifi': did you mean 'sparsify'" in message(head + "sparsifi: {}\n")
    assert "recipe.yaml:3: epochs: 'many' is not a number" in message(head + "train: {epochs: many}\n")
    assert "recipe.yaml:3: 'train' takes a mapping" in message(head + "train: yes\n")
    assert "needs 'output'" in message("model: m\n")
    assert "recipe.yaml:2: not valid YAML" in message("model: m\n  output: [\n")
    assert "needs 'train'" in message(head + "merge: {}\n")
    assert "it has to be a mapping" in message("- model\n")
    assert "evaluate_on knows" in message(head + "evaluate_on: [dense]\n")


def child(*arguments: object, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    return subprocess.Popen([*SQFT, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)  # fmt: skip


def test_a_full_disk_leaves_what_was_there(dense: Path, tmp_path: Path, capsys) -> None:
    assert call(capsys, "sparsify", dense, tmp_path / "out", *FAST)[0] == 0
    before = snapshot(tmp_path)

    def limit() -> None:  # writing beyond 20 kB fails as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = child("sparsify", dense, tmp_path / "out", *FAST, "--sparsity", "0.6", "--overwrite", preexec_fn=limit)
    _, err = process.communicate()
    assert (
        process.returncode == 1 and "cannot write" in err and "nothing was changed" in err and "Traceback" not in err
    ), err
    assert snapshot(tmp_path) == before


def test_a_read_only_folder(dense: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    if os.geteuid() == 0:  # root passes over permissions: let the check see what another user would
        monkeypatch.setattr("sqft.artifact.os.access", lambda path, mode: Path(path) != locked)
    else:
        locked.chmod(0o555)
    assert "not a writable folder" in fails(capsys, 2, "sparsify", dense, locked / "out", *FAST)


@pytest.mark.parametrize("stage", ["sparsify", "train", "merge", "evaluate"])
def test_ctrl_c_in_each_stage(
    stage: str, dense: Path, sparse: Path, trained: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the work: one message, exit code 1, nothing half-written."""
    where, arguments = {
        "sparsify": ("sqft.sparsity.pattern.Pattern.kept", [dense, tmp_path / "out", *FAST]),
        "train": ("sqft.training.callbacks.ProgressBar.on_step_end", [sparse, tmp_path / "out", *TRAIN]),
        "merge": ("sqft.merging.changes.merged_weight", [trained, tmp_path / "out"]),
        "evaluate": ("sqft.evaluation.generation.generate",
                     [sparse, "--task", "arithmetic", "--limit", 8, "--batch-size", 2, "--out", tmp_path / "out"]),
    }[stage]  # fmt: skip
    module, name = where.rsplit(".", 1)
    original, calls = pkgutil.resolve_name(where), []

    def interrupt(*args, **kwargs):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(pkgutil.resolve_name(module), name, interrupt)
    assert "interrupted" in fails(capsys, 1, stage, *arguments)
    assert len(calls) == 3 and not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if "writing" in p.name]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_real_signal_stops_training_and_the_same_command_resumes(number: int, sparse: Path, tmp_path: Path) -> None:
    command = ["train", sparse, tmp_path / "out", "--task", "arithmetic", "--limit", 64, "--eval-limit", 4,
               "--batch-size", 4, "--r", 4, "--save-steps", 5, "--max-steps", 400]  # fmt: skip
    process = child(*command)
    for _ in range(600):
        if list(tmp_path.glob(".out.training-*/checkpoint-*/sqft-whole.json")):
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted" in err and "Traceback" not in err, err
    assert [path.name[:14] for path in tmp_path.iterdir()] == [".out.training-"]
    _, err = child(*command, "-v").communicate(timeout=300)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file(), err
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 400 and not list(tmp_path.glob(".out*"))
