"""``sqft serve`` with the official client: names, answers as ``sqft generate`` gives them, streams, refusals."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pico import pico_model, pico_tokenizer

import sqft
from sqft.cli import main
from sqft.deployment import GenerateConfig
from sqft.serving.prepare import load_prepared
from sqft.serving.serve import confined, use_decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = pico_model(dtype=torch.float16)
    sqft.sparsify(model, sqft.SparsifyConfig(method="magnitude"))
    sqft.quantize(model, sqft.QuantizeConfig(method="rtn"))
    model.generation_config.eos_token_id = 256
    sqft.save(model, pico_tokenizer(), out := tmp_path_factory.mktemp("serve") / "pico")
    return out


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_the_official_client_is_answered(folder: Path) -> None:
    import openai

    expected = sqft.generate(folder, "one two", GenerateConfig(max_new_tokens=12, plain=True))["text"]
    port = free_port()
    command = [sys.executable, "-m", "sqft.cli", "serve", str(folder), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            names = wait_for(client, server)
            assert names == ["pico"]
            asked = {"model": "pico", "prompt": "one two", "max_tokens": 12}
            assert client.completions.create(**asked, temperature=0).choices[0].text == expected
            streamed = client.completions.create(**asked, temperature=0, stream=True)
            assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == expected
            drawn = client.completions.create(**asked, temperature=5.0, top_p=0.99, seed=1)
            assert 0 < drawn.usage.completion_tokens <= 12
            # What the decoder does not do is left to transformers.
            assert client.completions.create(**asked, temperature=0, stop=["\n\n\n"]).choices
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model="another", prompt="x")
        finally:
            server.terminate()


def wait_for(client, server) -> list[str]:
    import openai

    for _ in range(600):  # compiling takes a while where it was never done
        assert server.poll() is None, server.stderr.read()[-2000:]
        try:
            return [model.id for model in client.models.list()]
        except openai.APIConnectionError:
            time.sleep(0.2)
    raise AssertionError("the server did not start")


def test_batches_are_answered_by_the_decoder_as_by_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GenerationConfig

    live, _ = load_prepared(folder)
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    ids = torch.tensor([[0] * (5 - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (5 - len(row)) + [1] * len(row) for row in prompts])
    greedy = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=3, eos_token_id=None)
    expected = live.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    greedy.eos_token_id = int(expected[0, 7])  # where the first one ends, and perhaps others
    expected = live.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    monkeypatch.setattr(live, "generate", lambda **given: pytest.fail("transformers was asked"))
    use_decoder(live)
    assert torch.equal(live.generate(ids, greedy, attention_mask=mask), expected)
    with pytest.raises(pytest.fail.Exception):  # padded on the right
        live.generate(ids, greedy, attention_mask=mask.flip(-1))


@pytest.mark.parametrize("template", [
    "{% for a in range(10 ** 9) %}{% for b in range(10 ** 9) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 2000000 }}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{% set x = namespace(",
])  # fmt: skip
def test_a_strangers_chat_template_is_a_bad_request_and_the_next_one_is_answered(template: str) -> None:
    from fastapi import HTTPException

    tokenizer = pico_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{{ word }}{% if tools %}{{ tools[0].function.name }}{% endif %}{% endfor %}"
    tools = [{"type": "function", "function": {"name": "look"}}]
    asked = {
        "conversation": [{"role": "user", "content": "one two"}],
        "tools": tools,
        "word": "x",
        "return_tensors": "pt",
    }
    expected = tokenizer.apply_chat_template(**asked)
    with confined(tokenizer):
        for _ in range(2):
            assert torch.equal(tokenizer.apply_chat_template(**asked)["input_ids"], expected["input_ids"])
            with pytest.raises(HTTPException) as refused:
                tokenizer.apply_chat_template(**asked, chat_template=template)
            assert refused.value.status_code == 400 and refused.value.detail.startswith("the model's chat template: ")


def test_a_taken_port_and_wrong_options_are_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(folder), "--port", str(taken.getsockname()[1])]) == 1
    assert "choose another --port" in capsys.readouterr().err
    assert main(["serve", str(folder), "--port", "0"]) == 2
    assert "port is 0: it has to be at least 1" in capsys.readouterr().err
