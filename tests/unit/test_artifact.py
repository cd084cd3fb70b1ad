"""Stage folders: all or nothing, nothing of others deleted, and keys that follow what options name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pico import pico_model, pico_tokenizer

import sqft
from sqft import artifact, keys, outputs
from sqft.config import EvaluateConfig, MergeConfig, SearchConfig, SparsifyConfig, TrainConfig
from sqft.keys import folder_key, stage_key
from sqft.models.discover import describe


def write(out: Path, text: str, *, fail: bool = False, source: str | Path = "", config=None, names=("file",)) -> None:
    with artifact.stage("test", config, out, source, overwrite=True) as result:
        for name in names:
            (result.folder / name).write_text(text)
        if fail:
            raise RuntimeError


def test_a_stage_is_all_or_nothing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write(out, "one")
    with pytest.raises(RuntimeError):
        write(out, "two", fail=True)
    assert (out / "file").read_text() == "one" and len(list(out.parent.iterdir())) == 1
    write(out, "three")
    assert (out / "file").read_text() == "three" and len(list(out.parent.iterdir())) == 1
    manifest = artifact.check_files(out)
    assert manifest.files["file"]["bytes"] == 5 and len(manifest.files["file"]["sha256"]) == 64
    assert manifest.versions["torch"] == torch.__version__ and manifest.metrics["seconds"] >= 0
    (out / "file").unlink()
    with pytest.raises(sqft.SqftError, match="file is missing"):
        artifact.check_files(out)
    (out / "sqft.json").write_text("{")
    with pytest.raises(sqft.SqftError, match="corrupt"):
        artifact.read_manifest(out)


CHILD = """
import os, signal, sys
from pathlib import Path
from sqft import artifact, outputs
from sqft.config import SparsifyConfig
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
with artifact.stage("test", SparsifyConfig(), sys.argv[1], overwrite=True) as made:
    (made.folder / "file").write_text("new")
    made.work("training").mkdir()
    if sys.argv[2] == "work": die()
    if sys.argv[2] == "wait": print("holding", flush=True), sys.stdin.read()
    if sys.argv[2] == "renames": outputs.exchange = lambda *_: False
    if sys.argv[2] == "renames": outputs.Path.rename = lambda old, new, rename=outputs.Path.rename: (rename(old, new), die())
    if sys.argv[2] == "sweep": artifact.sweep = die
"""


def child(out: Path, how: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, out, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("how", "there"), [("work", "one"), ("renames", None), ("sweep", "new")])
def test_what_a_killed_process_leaves_the_next_one_removes(how: str, there: str | None, tmp_path: Path) -> None:
    """Killed at work, between two renames (where folders cannot be exchanged), and before it removed what was there."""
    out = tmp_path / "out [1]"  # brackets are no pattern
    write(out, "one")
    assert child(out, how).wait() == -9
    assert (out / "file").read_text() == there if there else not out.exists()
    assert len(list(tmp_path.iterdir())) > 1
    if how == "renames":
        with outputs.locked(out):
            outputs.sweep(out)
        assert (out / "file").read_text() == "one"  # it is brought back
    write(out, "two")
    assert (out / "file").read_text() == "two" and len(list(tmp_path.iterdir())) == 1


def test_a_second_process_on_an_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "out"
    process = child(out, "wait")
    assert process.stdout.readline() == "holding\n"
    with pytest.raises(sqft.SqftError, match="out is being written by another process"):
        write(out, "mine")
    assert all("kept (" in row["state"] and "another process" in row["state"] for row in outputs.clean(tmp_path))
    assert (out.parent / ".out.sqft-writing").exists()
    assert process.communicate("go")[0] == "" and process.returncode == 0
    assert (out / "file").read_text() == "new" and len(list(out.parent.iterdir())) == 1
    write(out, "mine")


def test_a_lock_that_is_removed_while_it_is_waited_for_is_no_lock(tmp_path: Path, monkeypatch) -> None:
    """Who holds it removes it; whoever opened it before that must not take it for the one that is there now."""
    flock, calls = outputs.fcntl.flock, []

    def late(handle: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / ".out.sqft-lock").unlink()
        flock(handle, how)

    monkeypatch.setattr(outputs.fcntl, "flock", late)
    with outputs.locked(tmp_path / "out"):
        assert len(calls) == 2 and (tmp_path / ".out.sqft-lock").exists()
    assert not list(tmp_path.iterdir())


def test_clean_removes_what_is_left_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "out", "one")
    assert child(tmp_path / "runs" / "out", "work").wait() == -9
    (tmp_path / "runs" / ".table.md.sqft-writing").write_text("half")
    for name in (".mine.lock", ".git", "out.sqft-writing", ".out.training-notes"):
        (tmp_path / "runs" / name).mkdir()
    rows = outputs.clean(tmp_path)
    assert sorted(Path(row["path"]).name.rsplit("-", 1)[0] for row in rows) == [
        ".out.sqft", ".out.sqft", ".out.training", ".table.md.sqft"
    ]  # fmt: skip
    assert {row["state"] for row in rows} == {"removed"} and outputs.clean(tmp_path / "runs" / "out") == []
    left = {path.name for path in (tmp_path / "runs").iterdir()}
    assert left == {"out", ".mine.lock", ".git", "out.sqft-writing", ".out.training-notes"}
    with pytest.raises(sqft.UsageError, match="there is no folder"):
        outputs.clean(tmp_path / "none")


def test_an_output_by_a_link_is_what_the_link_names(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "out", "one")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "out" / "file").read_text() == "two"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "file", "link", "out", "sqft.json"]
    with pytest.raises(sqft.UsageError, match="mount point"):
        artifact.check_output("/proc", overwrite=True)


def test_overwriting_never_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    """At every operation there is one of the two, where the system can exchange them."""
    out, seen = tmp_path / "out", []
    write(out, "one")
    for name in ("rename", "replace", "link", "unlink", "rmdir", "fsync", "mkdir"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, original=original, **k: (original(*a, **k), seen.append((out / "file").read_text()))[0]
        )
    write(out, "two")
    assert set(seen) == {"one", "two"}


def test_every_byte_of_a_folder_counts(tmp_path: Path) -> None:
    """Of each file and of the manifest, changed or cut; and what was read in this process before is read again."""
    out = tmp_path / "out"
    write(out, "text", config=SparsifyConfig(), names=("file", "a.json", "README.md"))
    checked = 0
    for file in (out / "file", out / "a.json", out / "sqft.json"):
        whole = file.read_bytes()
        artifact.check_files(out)
        for place in range(len(whole)):
            for damaged in (whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :], whole[:place]):
                file.write_bytes(damaged)
                os.utime(file, ns=(0, checked))
                with pytest.raises(sqft.SqftError, match=f"{file.name} (was changed|is corrupt|has )"):
                    artifact.check_files(out)
                checked += 1
        file.write_bytes(whole)
    assert checked > 1000
    (out / "README.md").write_text("mine")
    artifact.check_files(out)


def test_a_file_is_read_once_a_process(tmp_path: Path) -> None:
    write(tmp_path / "out", "text")
    artifact.check_files(tmp_path / "out")
    before = keys._digest.cache_info()
    artifact.check_files(tmp_path / "out")
    after = keys._digest.cache_info()
    assert after.misses == before.misses and after.hits == before.hits + 1


def test_a_parent_that_changes_while_it_is_read_has_no_child(tmp_path: Path) -> None:
    write(tmp_path / "one", "text")
    with (
        pytest.raises(sqft.SqftError, match="one was changed while it was read"),
        artifact.stage("test", SparsifyConfig(), tmp_path / "two", tmp_path / "one"),
    ):
        write(tmp_path / "one", "another")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_newer_manifest_says_update_sqft(tmp_path: Path) -> None:
    """Also one with fields that this version does not know."""
    (tmp_path / "sqft.json").write_text('{"stage": "x", "format": 99, "something_new": {}}')
    with pytest.raises(sqft.SqftError, match="update sqft"):
        artifact.read_manifest(tmp_path)
    (tmp_path / "sqft.json").write_text('{"stage": "x", "format": 1}')
    with pytest.raises(sqft.SqftError, match="run the stage again"):
        artifact.read_manifest(tmp_path)


def test_overwriting_keeps_what_sqft_did_not_write(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "one", names=("file", "old"))
    (out / "notes").mkdir()
    (out / "notes" / "thesis.txt").write_text("years of work")
    write(out, "two")
    assert (out / "notes" / "thesis.txt").read_text() == "years of work"
    assert (out / "file").read_text() == "two" and not (out / "old").exists()
    assert "notes/thesis.txt" not in artifact.read_manifest(out).files
    (out / "old").write_text("mine by now")
    with pytest.raises(
        sqft.SqftError, match=r"old was not written by sqft, and the new result has a file of that name"
    ):
        write(out, "three", names=("file", "old"))
    assert (out / "old").read_text() == "mine by now" and (out / "file").read_text() == "two"


@pytest.mark.parametrize("manifest", ["{", '{"stage": "test", "format": 1, "files": {"file": 3}}'])
def test_a_folder_whose_manifest_cannot_be_read_is_kept(manifest: str, tmp_path: Path) -> None:
    """Which of its files are sqft's is not known."""
    write(tmp_path / "out", "one", names=("file", "mine"))
    (tmp_path / "out" / "sqft.json").write_text(manifest)
    write(tmp_path / "out", "two")
    assert (tmp_path / "out" / "file").read_text() == "two" and not (tmp_path / "out" / "mine").exists()
    (kept,) = tmp_path.glob("out.unreadable-*")
    assert (kept / "file").read_text() == (kept / "mine").read_text() == "one"


def test_an_output_that_holds_the_input_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "one")
    for source in (out, out / "file", out / ".." / "out"):
        with pytest.raises(sqft.UsageError, match="is, or holds, the input"):
            write(out, "two", source=source)
    with pytest.raises(sqft.UsageError, match="is, or holds, the input"):  # a folder that an option names
        write(out, "two", config=TrainConfig(adapter="qa-sparse-peft", base=str(out), task="arithmetic"))
    assert (out / "file").read_text() == "one"


def test_keys_follow_options_inputs_and_parents(tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("one")
    config = TrainConfig(data=str(data), r=4)
    key = stage_key("train", config, "parent")
    others = [stage_key("train", TrainConfig(data=str(data), r=8), "parent"), stage_key("train", config, "other"),
              stage_key("merge", config, "parent"), stage_key("train", config, "parent", {"data": "mine"})]  # fmt: skip
    (tmp_path / "moved.txt").write_text("one")
    assert key == stage_key("train", TrainConfig(data=str(tmp_path / "moved.txt"), r=4), "parent")  # never the path
    data.write_text("two")
    others.append(stage_key("train", config, "parent"))
    assert len({key, *others}) == 6


def test_keys_hash_every_task_file(tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text("base: piqa\n")
    config = EvaluateConfig(task=f"piqa+{task}")
    key = stage_key("evaluate", config, "")
    task.write_text("base: boolq\n")
    assert stage_key("evaluate", config, "") != key


def test_keys_hash_the_base_and_never_its_path(tmp_path: Path) -> None:
    keys = []
    for name, text in (("here", "one"), ("there", "one"), ("other", "two")):
        write(tmp_path / name, text)
        config = TrainConfig(adapter="qa-sparse-peft", base=str(tmp_path / name), task="arithmetic")
        keys.append(stage_key("train", config, ""))
    assert keys[0] == keys[1] != keys[2]


def test_keys_hash_nothing_because_a_file_of_that_name_lies_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = [SparsifyConfig(), SearchConfig(task="gsm8k"), MergeConfig(ranks="median")]
    keys = [stage_key("x", config, "") for config in configs]
    for name in ("wanda", "builtin", "gsm8k", "median", "auto", "validation", "0.5"):
        (tmp_path / name).write_text("a file that no option names")
    assert keys == [stage_key("x", config, "") for config in configs]


def test_the_machine_is_no_part_of_a_key() -> None:
    one = SearchConfig(task="gsm8k", device="cpu", workers=1)
    two = SearchConfig(task="gsm8k", device="cuda", workers=4, storage="sqlite:///x")
    assert stage_key("search", one, "") == stage_key("search", two, "")


def test_a_manifest_holds_no_password(tmp_path: Path) -> None:
    config = SearchConfig(task="gsm8k", storage="postgresql://me:s3cret@host:5432/db")
    write(tmp_path / "out", "text", config=config)
    text = (tmp_path / "out" / "sqft.json").read_text()
    assert "s3cret" not in text and json.loads(text)["config"]["storage"] == "postgresql://me:***@host:5432/db"


def test_equal_files_have_one_key_and_others_another(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        write(tmp_path / name, text)
    keys = [folder_key(tmp_path / name) for name in "abc"]
    assert keys[0] == keys[1] != keys[2]


def test_equal_weights_with_other_masks_have_other_keys(tmp_path: Path) -> None:
    """A kept weight may be zero by chance: the masks tell the models apart, and so do their keys."""
    for name, kept in (("a", 0), ("b", 0), ("c", 1)):
        model = pico_model()
        weight = next(describe(model).weights())
        weight.write(torch.zeros(weight.shape))
        mask_OI = torch.zeros(weight.shape, dtype=torch.bool)
        mask_OI[:kept] = True
        weight.set_mask(mask_OI)
        sqft.save(model, pico_tokenizer(), tmp_path / name)
    keys = [folder_key(tmp_path / name) for name in "abc"]
    assert keys[0] == keys[1] != keys[2]
