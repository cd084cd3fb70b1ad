"""``sqft generate``: any folder answers, exactly or fast, streaming or as JSON; wrong input is named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from pico import pico_model, pico_tokenizer

import sqft
from sqft.cli import main
from sqft.deployment import GenerateConfig
from sqft.kernels.cpu.library import library
from sqft.serving.generate import pick
from sqft.serving.prepare import load_prepared


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = pico_model(hidden_size=64, intermediate_size=128)
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    sqft.quantize(model, sqft.QuantizeConfig(method="rtn", group_size=32))
    model.generation_config.eos_token_id = None  # a random model would stop anywhere
    sqft.save(model, pico_tokenizer(), path := tmp_path_factory.mktemp("generate") / "packed")
    sqft.pack(path, out=path.with_name("compact"))
    return path


def test_fast_exact_and_compact_answers_are_the_same(packed: Path) -> None:
    config, pieces = GenerateConfig(max_new_tokens=12), []
    fast = sqft.generate(packed, "two and two", config, say=pieces.append)
    exact = sqft.generate(packed, "two and two", GenerateConfig(max_new_tokens=12, exact=True))
    compact = sqft.generate(packed.with_name("compact"), "two and two", config)
    assert fast["text"] == compact["text"] == "".join(pieces)
    assert fast["text"] == exact["text"] or not library()  # torch's INT4 kernel is not as exact
    assert fast["tokens"] == exact["tokens"] == 12 and fast["prompt_tokens"] == 11
    assert fast["tokens_per_second"] > 0 and fast["seconds_to_first"] > 0


@pytest.mark.skipif(not library(), reason="no C++ compiler here")
@pytest.mark.parametrize("bits", [0, 3, 4, 8])
def test_a_compact_folder_is_taken_as_it_lies(bits: int, tmp_path: Path) -> None:
    """The same layers as of the whole folder, bit for bit; 3 bits have no kernel and are unpacked."""
    model = pico_model("qwen2", dtype=torch.float16)
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude", exclude=["v_proj"]))
    if bits:
        options = {"exclude": ["k_proj", "v_proj"]} if bits == 3 else {}
        sqft.quantize(model, sqft.QuantizeConfig(method="rtn", bits=bits, **options))
    sqft.save(model, pico_tokenizer(), tmp_path / "whole")
    sqft.pack(tmp_path / "whole", out=tmp_path / "compact")
    one, other = (load_prepared(tmp_path / name)[0] for name in ("whole", "compact"))
    state, again = one.state_dict(), other.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    with torch.no_grad():
        assert torch.equal(one(torch.arange(8)[None]).logits, other(torch.arange(8)[None]).logits)


def test_it_stops_at_the_end_of_text(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = sqft.generate(packed, "two and two", GenerateConfig(max_new_tokens=12))
    monkeypatch.setattr("sqft.serving.generate.pick", lambda logits, temperature, top_p: 256)
    assert sqft.generate(packed, "two and two", GenerateConfig(max_new_tokens=12))["tokens"] == 12 == long["tokens"]
    model, tokenizer = sqft.load(packed)
    model.generation_config.eos_token_id = 256
    sqft.save(model, tokenizer, packed.with_name("stops"), overwrite=True)
    assert sqft.generate(packed.with_name("stops"), "two", GenerateConfig(max_new_tokens=12))["tokens"] == 1


def test_an_adapter_answers_with_its_base(packed: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "two and two are four"}) + "\n")
    config = sqft.TrainConfig(adapter="qa-sparse-peft", data=str(text), r=2, max_steps=2, batch_size=1)
    sqft.train(packed, config, out=tmp_path / "adapter")
    assert sqft.generate(tmp_path / "adapter", "two and", GenerateConfig(max_new_tokens=3))["tokens"] == 3


def test_sampling_takes_what_makes_up_top_p() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9, -1.0])
    assert pick(logits, 0.0) == 1
    torch.manual_seed(0)
    assert {pick(logits, 1.0, 0.6) for _ in range(60)} == {1, 2}
    assert {pick(logits, 1.0, 0.1) for _ in range(20)} == {1}
    assert {pick(logits, 50.0, 1.0, 2) for _ in range(60)} == {1, 2}
    assert len({pick(logits, 50.0) for _ in range(200)}) == 4


def test_the_command_line(packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two and two"))
    assert main(["generate", str(packed), "-", "--max-new-tokens", "5"]) == 0
    streamed = capsys.readouterr()
    assert "tokens 5" in streamed.err and "tokens per second" in streamed.err
    assert main(["generate", str(packed), "two and two", "--max-new-tokens", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert streamed.out == found["text"] + "\n"
    for arguments, message in ((["  "], "the prompt is empty"), (["x", "--temperature", "-1"], "temperature is -1.0"),
                               (["x", "--max-new-tokens", "0"], "max_new_tokens is 0"), (["x", "--maximum", "3"], "unknown option")):  # fmt: skip
        assert main(["generate", str(packed), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["generate", str(packed / "nothing"), "x"]) == 2
    assert "nothing" in capsys.readouterr().err
