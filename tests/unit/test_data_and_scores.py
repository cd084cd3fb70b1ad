"""Text sources, templates, tokenization, packing, intervals, perplexity, generation."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pico import pico_model, pico_tokenizer
from tokenizers.processors import TemplateProcessing

import sqft
from sqft.calibration.data import Record, read_records, read_texts, token_blocks, token_stream, with_bos
from sqft.compressing.tokens import calibration_tokens
from sqft.config import SparsifyConfig, TrainConfig
from sqft.evaluation.generation import cut, generate
from sqft.evaluation.intervals import normal, wilson
from sqft.evaluation.perplexity import perplexity
from sqft.evaluation.scoring import score
from sqft.keys import stage_key
from sqft.tasks.arithmetic import ArithmeticTask
from sqft.tasks.lookup import get_task
from sqft.training.data import IGNORED, fill_templates, pack_rows, tokenize, tokenize_all


def test_sources(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write((tmp_path / "a.jsonl").read_text())
    (tmp_path / "c.txt").write_text("one\n\ntwo\n")
    assert read_records(str(tmp_path / "a.jsonl")) == read_records(str(tmp_path / "b.jsonl.gz")) == rows
    assert read_texts(str(tmp_path / "c.txt")) == ["one", "two\n"]
    assert len(read_texts("builtin")) > 40
    folder = tmp_path / "data set"  # read by the datasets library, as a hub name would be
    folder.mkdir()
    for split, row in zip(("train", "test"), rows, strict=True):
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    assert read_records(str(folder)) == rows[:1] and read_records(f"{folder}@test") == rows[1:]


def test_wrong_sources(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    (tmp_path / "table.csv").write_text("a,b")
    for name, message in [("bad.jsonl", r"bad.jsonl:2: not JSON"), ("list.jsonl", "JSON object"), ("empty.txt", "is empty"),
                          ("other.jsonl", "no 'text' field but body"), ("cut.txt.gz", "cannot read"),
                          ("table.csv", "neither text nor JSON lines"), ("none.txt", "there is no file")]:  # fmt: skip
        with pytest.raises(sqft.SqftError, match=message):
            read_texts(str(tmp_path / name))
    with pytest.raises(sqft.SqftError, match="as a datasets name it does not load"):
        read_records("no-such-data-set")


def test_blocks_are_seeded_pieces_of_the_text() -> None:
    tokenizer = pico_tokenizer()
    blocks = token_blocks(tokenizer, read_texts("builtin"), 5, 40, seed=3)
    assert blocks.shape == (5, 40) and blocks.dtype == torch.int64
    assert torch.equal(blocks, token_blocks(tokenizer, read_texts("builtin"), 5, 40, seed=3))
    assert not torch.equal(blocks, token_blocks(tokenizer, read_texts("builtin"), 5, 40, seed=4))
    texts = read_texts("builtin")
    for block in blocks:
        assert all(any(part in text for text in texts) for part in tokenizer.decode(block).split("\n\n"))
    with pytest.raises(sqft.SqftError, match="fewer than one block"):
        token_blocks(tokenizer, read_texts("builtin"), 1, 10**6, seed=0)


def test_calibration_tokens_of_several_sources(tmp_path: Path) -> None:
    """Each source's blocks are what it would give alone; a task's text is what training learns from."""
    tokenizer, file = pico_tokenizer(), tmp_path / "a+b.jsonl"
    file.write_text("".join(json.dumps({"text": f"line {i} of a file"}) + "\n" for i in range(40)))
    examples = get_task("arithmetic").examples("train")

    def tokens(calibration: str, samples: int = 8) -> torch.Tensor:
        return calibration_tokens(
            tokenizer, SparsifyConfig(calibration=calibration, samples=samples, length=24, seed=3)
        )

    assert torch.equal(tokens("builtin"), token_blocks(tokenizer, read_texts("builtin"), 8, 24, seed=3))
    assert torch.equal(tokens(str(file)), token_blocks(tokenizer, read_texts(str(file)), 8, 24, seed=3))
    texts = [example.prompt + example.completion for example in examples]
    assert torch.equal(tokens("arithmetic"), token_blocks(tokenizer, texts, 8, 24, seed=3))
    file.rename(tmp_path / "c.jsonl")
    for mixed, counts in ((f"arithmetic+{tmp_path}/c.jsonl", (4, 4)), (f"arithmetic=3+{tmp_path}/c.jsonl=1", (6, 2)),
                          ("arithmetic=0.1+builtin=10", (0, 8))):  # fmt: skip
        names = [name.partition("=")[0] for name in mixed.split("+")]
        parts = [tokens(name, count) for name, count in zip(names, counts, strict=True) if count]
        assert torch.equal(tokens(mixed), torch.cat(parts)), mixed
    for wrong, message in (("arithmetic+none.jsonl", "no file none.jsonl"), ("gsm9k+builtin", "'gsm9k' is no file"),
                           ("", "names no text"), ("builtin+", "names no text"), ("builtin=0", "names no text")):  # fmt: skip
        with pytest.raises(sqft.SqftError, match=message):
            tokens(wrong)


def test_keys_of_several_sources(tmp_path: Path) -> None:
    """They follow the contents of each file, and the weights."""
    file = tmp_path / "c.txt"
    file.write_text("one")

    def key(calibration: str) -> str:
        return stage_key("sparsify", SparsifyConfig(calibration=calibration), "")

    before = [key(f"{file}"), key(f"gsm8k+{file}"), key(f"gsm8k=2+{file}"), key("gsm8k"), key("piqa")]
    assert len(set(before)) == 5 and key(f"gsm8k=1+{file}") == key(f"gsm8k+{file}")
    file.rename(tmp_path / "moved.txt")
    assert key(f"gsm8k+{tmp_path}/moved.txt") == before[1]
    (tmp_path / "moved.txt").write_text("two")
    keys = [stage_key("train", TrainConfig(data=f"runs/rate={n}"), "") for n in (1, 2)]
    assert keys[0] != keys[1]  # one name, no weight
    assert key(f"gsm8k+{tmp_path}/moved.txt") not in before and key(f"{tmp_path}/moved.txt") not in before


def test_blocks_begin_with_bos_where_the_tokenizer_begins_a_text_with_it() -> None:
    plain, gemma = pico_tokenizer(), pico_tokenizer()
    gemma.backend_tokenizer.post_processor = TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", gemma.bos_token_id)]
    )
    without, blocks = (token_blocks(tokenizer, read_texts("builtin"), 5, 40, seed=3) for tokenizer in (plain, gemma))
    assert (blocks[:, 0] == gemma.bos_token_id).all() and torch.equal(blocks[:, 1:], without[:, 1:])
    assert with_bos(plain, without) is without


def test_templates() -> None:
    records = [Record({"question": "1+1?", "answer": 2}, "x.jsonl:1")]
    (example,) = fill_templates(records, "Q: {question}\\nA:", " {answer}")
    assert (example.prompt, example.completion) == ("Q: 1+1?\nA:", " 2")
    with pytest.raises(sqft.UsageError, match=r"x.jsonl:1: the record has no field 'anser'.*question, answer"):
        fill_templates(records, "{question}", "{anser}")


def test_loss_on_the_completion_and_the_end_of_text_only() -> None:
    tokenizer = pico_tokenizer()
    row = tokenize(sqft.Example("ab", " c"), tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "ab c<eos>"
    assert row["labels"][:2] == [IGNORED] * 2 and row["labels"][2:] == row["input_ids"][2:]
    every = tokenize(sqft.Example("ab", " c"), tokenizer, completion_only=False)
    assert every["labels"] == every["input_ids"]
    (short,) = tokenize_all([sqft.Example("ab", " c")], tokenizer, TrainConfig(task="arithmetic", max_length=3))
    assert len(short["input_ids"]) == len(short["labels"]) == 3
    with pytest.raises(sqft.SqftError, match="1 without room for their completion"):
        tokenize_all([sqft.Example("abcdef", " c")], tokenizer, TrainConfig(task="arithmetic", max_length=3))


def test_packing_keeps_every_token_in_order() -> None:
    rows = [{"input_ids": list(range(i, i + 5)), "labels": [IGNORED, *range(i + 1, i + 5)]} for i in range(0, 35, 5)]
    packed = pack_rows(rows, 8)
    assert [len(row["input_ids"]) for row in packed] == [8, 8, 8, 8, 3]
    assert [i for row in packed for i in row["input_ids"]] == list(range(35))
    assert [i for row in packed for i in row["labels"]] == [i for row in rows for i in row["labels"]]


def test_wilson_interval_covers() -> None:
    assert wilson(0, 10)[0] == 0 and math.isclose(wilson(10, 10)[1], 1)
    low, high = wilson(50, 100)
    assert math.isclose(low, 0.4038, abs_tol=1e-4) and math.isclose(high, 0.5962, abs_tol=1e-4)  # a textbook value
    g = torch.Generator().manual_seed(0)
    hits = 0
    for correct in torch.binomial(torch.full((2000,), 40.0), torch.full((2000,), 0.1), generator=g).tolist():
        low, high = wilson(int(correct), 40)
        hits += low <= 0.1 <= high
    assert hits / 2000 > 0.93
    assert normal([3.0]) == (3.0, 3.0)


def test_perplexity_is_the_mean_over_windows(tmp_path: Path) -> None:
    model, tokenizer = pico_model(), pico_tokenizer()
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    stream = token_stream(tokenizer, read_texts(str(tmp_path / "t.txt")))
    expected, windows = 0.0, len(stream) // 32
    for i in range(windows):
        window = stream[32 * i : 32 * i + 32]
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        expected -= float(F.log_softmax(logits[:-1], -1).gather(1, window[1:, None]).mean()) / windows
    for batch in (1, 3):
        scores = perplexity(model, tokenizer, str(tmp_path / "t.txt"), length=32, batch_size=batch)
        assert math.isclose(scores["perplexity"], math.exp(expected), rel_tol=1e-5)
        assert scores["windows"] == windows > 1 and "perplexity_ci95" in scores
    assert "perplexity_ci95" not in perplexity(model, tokenizer, str(tmp_path / "t.txt"), length=10**4)  # one window


def test_generation_does_not_depend_on_the_batch() -> None:
    """Left padding: a problem's answer is the same alone and beside longer ones."""
    model, tokenizer, task = pico_model(), pico_tokenizer(), ArithmeticTask()
    alone, records = score(model, tokenizer, task, "test", 5, batch_size=1)
    together, batched = score(model, tokenizer, task, "test", 5, batch_size=5)
    assert alone == together and records == batched
    assert [record["prompt"] for record in records] == [e.prompt for e in task.examples("test", 5)]
    texts = generate(model, tokenizer, [records[0]["prompt"]], 64, task.stop)
    assert texts == [records[0]["generated"]]


def test_cut_at_the_first_stop_string() -> None:
    assert cut("a\n\nb\nQuestion: c", ("\nQuestion:", "\n\n")) == "a"
    assert cut("a b", ("\n",)) == "a b"
