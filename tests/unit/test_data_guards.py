"""Data that is odd but right, what is left out and counted, and where numbers may lie. What is refused: test_wrong.py."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
import warnings
from pathlib import Path

import pytest
from pico import pico_folder, pico_tokenizer

import sqft
import sqft.cli
from sqft.calibration.data import LONGEST, read_records, read_texts
from sqft.config import TrainConfig
from sqft.errors import Note
from sqft.evaluation.generation import generate
from sqft.recipe import SECTIONS
from sqft.stages import ROWS
from sqft.training.data import load_examples, padding, tokenize_all

CONFIGS = dict.fromkeys(
    [*SECTIONS.values(), *(row.config for row in ROWS), sqft.GenerateConfig, sqft.ServeConfig, sqft.BenchConfig]
)


def numeric(hint: object) -> bool:
    return any(kind in (int, float) for kind in (hint, *typing.get_args(hint))) and typing.get_origin(hint) is not dict


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_number_has_an_interval_and_holds_it_in_python_too(config: type) -> None:
    hints = typing.get_type_hints(config)
    given = {"text": "builtin"} if config is sqft.EvaluateConfig else {}
    for spec in dataclasses.fields(config):
        if not numeric(hints[spec.name]):
            continue
        within = spec.metadata["within"]
        assert within and within[0] in "[(" and within[-1] in "])", spec.name
        low, high = map(float, within[1:-1].split(","))
        assert math.isfinite(low) and math.isfinite(high)
        wrap = (lambda value: [value]) if typing.get_origin(hints[spec.name]) is list else (lambda value: value)
        for wrong in (math.nan, math.inf, -math.inf, low - 1, high + 1):
            with pytest.raises(sqft.UsageError, match=f"{spec.name} is "):
                config(**{**given, spec.name: wrap(wrong)})


def test_files_of_other_systems_are_read(tmp_path: Path) -> None:
    """A byte-order mark, \\r\\n, no line break at the end, blank lines between records, numbers as texts."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one", "n": 1}\r\n\r\n{"text": "two", "n": 2.5}')
    records = read_records(str(file))
    assert records == [{"text": "one", "n": 1}, {"text": "two", "n": 2.5}]
    assert [record.at for record in records] == [f"{file}:1", f"{file}:3"]
    assert [record.text("n") for record in records] == ["1", "2.5"]
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xef\xbb\xbfone\r\nmore\r\n\r\ntwo\r\n\r\n\r\n\r\nthree")
    assert read_texts(str(text)) == ["one\nmore", "two", "three"]
    assert [record.at for record in read_records(str(text))] == [f"{text}:1", f"{text}:4", f"{text}:8"]
    text.write_text("x" * LONGEST)
    assert len(read_texts(str(text))[0]) == LONGEST
    (tmp_path / "set").mkdir()
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, None]}).to_parquet(str(tmp_path / "set" / "train.parquet"))
    assert read_texts(str(tmp_path / "set")) == ["a", "b"]
    with pytest.raises(sqft.SqftError, match="row 2: field 'n' is null"):
        [record.text("n") for record in read_records(str(tmp_path / "set"))]


def test_what_is_left_out_is_counted_and_said(sparse: Path, tmp_path: Path, capsys) -> None:
    data, blank = tmp_path / "data.jsonl", tmp_path / "blank.jsonl"
    data.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in
                            [("1", "2"), ("1", ""), ("1", " \n"), ("x" * 40, "2"), ("1", "y" * 40), ("2", "3")]))  # fmt: skip
    command = ["train", sparse, tmp_path / "out", "--data", data, "--prompt", "{q}=", "--completion", "{a}", "--r", 2,
               "--max-length", 20, "--max-steps", 1, "--batch-size", 2]  # fmt: skip
    assert sqft.cli.main([str(part) for part in command]) == 0
    said = capsys.readouterr().err
    assert ("note: of 6 examples 2 without a completion (left out), 1 without room for their completion (left out), 1 cut; "
            "max_length is 20\n") in said  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "sqft.json").read_text())["metrics"]
    assert (metrics["empty_completions"], metrics["cut_to_nothing"], metrics["cut"]) == (2, 1, 1)
    blank.write_text('{"text": "a"}\n{"text": " "}\n{"text": ""}\n')
    with pytest.warns(Note, match="2 of 3 texts are blank, and left out"):
        assert read_texts(str(blank)) == ["a"]


def test_templates_are_plain() -> None:
    """What is in a record is text, whatever braces it has; braces of a template are doubled."""
    import tempfile

    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "a.jsonl"
        file.write_text(json.dumps({"a b": "{c}", "c": 3}) + "\n")
        (example,) = load_examples(TrainConfig(data=str(file), prompt="{{{a b}}}\\n", completion="{c}")).examples
    assert (example.prompt, example.completion) == ("{{c}}\n", "3")


def test_tokenizers_without_pad_or_end(tmp_path: Path) -> None:
    """Rows are filled up with what is masked, and a completion without an end is said."""
    folder = pico_folder(tmp_path / "bare")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file := folder / name).is_file():
            values = json.loads(file.read_text())
            file.write_text(json.dumps({k: v for k, v in values.items() if k not in ("pad_token", "eos_token")}))
    model, tokenizer = sqft.load(folder)
    assert tokenizer.pad_token_id is None and tokenizer.eos_token_id is None and padding(tokenizer) == 0
    config = TrainConfig(task="arithmetic", max_steps=1, batch_size=4, r=2, adapter="lora", limit=8, eval_limit=4)
    with pytest.warns(Note, match="no end-of-text token"):
        metrics = sqft.train(folder, config, out=tmp_path / "out")
    assert math.isfinite(metrics["loss"]) and math.isfinite(metrics["eval_loss"])
    texts = generate(model, tokenizer, ["a", "longer one"], 4, ())
    assert len(texts) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        tokenize_all([sqft.Example("a", "b")], pico_tokenizer(), TrainConfig())


def test_a_task_without_problems_has_no_score(dense: Path) -> None:
    from sqft.evaluation.scoring import score
    from sqft.tasks.arithmetic import ArithmeticTask

    model, tokenizer = sqft.load(dense)
    task = ArithmeticTask(sizes={"train": 1, "validation": 0, "test": 0})
    with pytest.raises(sqft.SqftError, match="has no problems"):
        score(model, tokenizer, task, "test", None, 4)


def test_what_memory_is_left_knows_of_every_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    from sqft import limits

    whole = limits.memory_left()
    assert whole > 2**24
    monkeypatch.setattr(limits, "GROUP", tmp_path)
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 5\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert limits.memory_left() > 2**24
    (tmp_path / "memory.max").write_text("5000\n")
    assert limits.memory_left() == 4000
    (tmp_path / "memory.max").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (2**20, hard))  # less than there is already
        assert limits.memory_left() == 0
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
