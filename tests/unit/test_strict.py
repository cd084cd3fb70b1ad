"""What a stranger's file may hold: everything else is one line that names the cause, and nothing hangs, grows or escapes."""

from __future__ import annotations

import json
import os
import time
import unicodedata
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_tokenizer

from sqft import artifact
from sqft.config import SparsifyConfig
from sqft.deployment import GenerateConfig
from sqft.elastic.handle import RECORDS
from sqft.elastic.heuristics import read_rank_records
from sqft.errors import SqftError, UsageError
from sqft.keys import sealed_text
from sqft.limits import SECONDS
from sqft.options import coerce, from_dict
from sqft.recipe import Recipe, load_recipe, run
from sqft.serving.generate import _tokens
from sqft.strict import parse_json, plain_name, read_json, read_yaml
from sqft.tasks.lookup import get_task

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def one_line(call, *words: str, kind: type[SqftError] = SqftError) -> str:
    """The message of the error that a call raises."""
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert len(text) < 2500 and all(word in text for word in words), text
    assert not any(unicodedata.category(character) == "Cc" for character in text), text
    return text


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@given(PLAIN)
@settings(max_examples=200, deadline=None)
def test_json_that_is_within_the_limits_reads_as_python_reads_it(value) -> None:
    assert parse_json(json.dumps(value)) == value


@given(st.dictionaries(st.from_regex(r"[a-z][a-z ]{0,8}[a-z]", fullmatch=True), PLAIN, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_yaml_that_is_within_the_limits_reads_as_pyyaml_reads_it(tmp_path_factory, value) -> None:
    text = yaml.safe_dump(value)
    file = put(tmp_path_factory.getbasetemp() / "same.yaml", text)
    whole = {str(key): inner for key, inner in yaml.safe_load(text).items()}
    if "=" not in text and "<<" not in text and not _other_keys(whole):
        assert read_yaml(file)[0] == whole


def _other_keys(value) -> bool:
    """Keys that YAML takes for numbers and the like are texts here."""
    if isinstance(value, dict):
        return any(not isinstance(key, str) or _other_keys(inner) for key, inner in value.items())
    return isinstance(value, list) and any(map(_other_keys, value))


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100_000, "nested more than 32"),
        ("[" * 33 + "]" * 33, "nested more than 32"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"a": NaN}', "NaN is no finite number"),
        ('{"a": 1e999}', "1e999 is no finite number"),
        ('{"a": ' + "9" * 100_000 + "}", "a number has 100,000 digits"),
        ("[" + "1," * 4_000_001, "more than 4,000,000 values"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_is_not(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_what_is_no_text_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "bytes").write_bytes(b'{"a": "\xff"}')
    with (tmp_path / "long").open("wb") as stream:
        stream.truncate(2**26 + 1)
    for name, words in (
        ("pipe", "not a file"),
        ("device", "not a file"),
        ("bytes", "codec"),
        ("long", "more than 67,108,864"),
    ):
        with pytest.raises(ValueError, match=words):
            read_json(tmp_path / name)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text, words",
    [
        (BOMB, "stand for more than 100,000 values"),
        ("a: &a [*a]\n", "nested more than 32"),
        ("a: " + "[" * 50_000, "nested more than 32"),
        ("a: " + "[" * 40 + "]" * 40, ":1: it is nested more than 32"),
        ("a: 1\nb: 2\na: 3\n", ":3: 'a' is given twice"),
        ("a: !!python/object/apply:os.system ['true']\n", ":1: a value with a tag"),
        ("a: 2001-99-99\n", "a timestamp, which is not read"),
        ("a: 2024-01-01\n", "put it in quotes"),
        ("a: .inf\n", "no finite number"),
        ("a: .nan\n", "no finite number"),
        ("a: 1.0e+999\n", "no finite number"),
        ("a: " + "9" * 100_000, "a number has 100,000 digits"),
        ("a: 0x" + "f" * 5000, "a number has 5,002 digits"),
        ("x" * 2**18, "more than 131,072 bytes"),
        ("[1, 2]", "it has to be a mapping"),
        ("? [a, b]\n: 1\n", ":1: a key has to be a text"),
        ("a: 'b", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("", "it has to be a mapping"),
    ],
)
def test_yaml_that_is_not(tmp_path: Path, text: str, words: str) -> None:
    file = put(tmp_path / "x.yaml", text)
    started = time.process_time()
    one_line(lambda: read_yaml(file), str(file), words, kind=UsageError)
    assert time.process_time() - started < 5


def test_a_few_references_and_merges_are_read(tmp_path: Path) -> None:
    file = put(tmp_path / "x.yaml", "base: &b {x: 1, y: 2}\nuse: {<<: *b, y: 3}\nlist: [*b]\n1: one\ntrue: yes\n")
    values, lines = read_yaml(file)
    assert values == {
        "base": {"x": 1, "y": 2},
        "use": {"x": 1, "y": 3},
        "list": [{"x": 1, "y": 2}],
        "1": "one",
        "true": True,
    }
    assert lines["base",] == 1 and lines["use",] == 2 and lines["use", "y"] == 2


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a/..", "..", ".", "", "a//b", "a\\b", "a\0b", "./a", 3])
def test_names_that_leave_a_folder(name) -> None:
    assert not plain_name(name)
    assert plain_name("a/b.c") and plain_name("..a") and plain_name("model-00001-of-2.safetensors")


@pytest.mark.parametrize("value", ["1e999", "nan", "inf", "9" * 5000, 10**400, float("nan"), [], {}, None, "x", 2**63])
def test_numbers_of_options(value) -> None:
    one_line(lambda: from_dict(SparsifyConfig, {"samples": value}, "r.yaml"), "r.yaml: samples", kind=UsageError)
    assert coerce(2**53 + 1, int) == 2**53 + 1


def test_options_whose_names_and_values_are_long_or_have_lines(tmp_path: Path) -> None:
    one_line(lambda: from_dict(SparsifyConfig, {"x\ny" * 10_000: 1}), "unknown option", kind=UsageError)
    one_line(lambda: from_dict(SparsifyConfig, {"method": "x\ny\x1b[2J" * 10_000}), "unknown", kind=UsageError)
    one_line(lambda: from_dict(SparsifyConfig, {"mask": "x" * 300}), "no path", kind=UsageError)
    one_line(lambda: load_recipe(put(tmp_path / "r.yaml", "modl: x\noutput: y\n")), ":1: unknown key 'modl'", "'model'")
    one_line(lambda: load_recipe(put(tmp_path / "r.yaml", "1: x\n")), ":1: unknown key '1'")
    one_line(lambda: load_recipe(put(tmp_path / "r.yaml", "model: m\noutput: {a: 1}\n")), ":2: output is")
    one_line(lambda: load_recipe(put(tmp_path / "r.yaml", f"model: m\noutput: {'x' * 300}\n")), ":2: output is")
    one_line(lambda: load_recipe(put(tmp_path / "r.yaml", "model: m\norder: 3\n")), ":2: order knows")


def sealed(folder: Path, **values) -> Path:
    whole = {"stage": "save", "key": "k", "format": 3, **values}
    put(folder / "sqft.json", sealed_text({name: value for name, value in whole.items() if value != "left out"}))
    return folder


@pytest.mark.parametrize(
    "values, words",
    [
        ({"files": {"../../kept": {"bytes": 4, "sha256": "0"}}}, "'../../kept' is no file of this folder"),
        ({"files": {"/etc/passwd": {"bytes": 4, "sha256": "0"}}}, "no file of this folder"),
        ({"files": {"a": {"bytes": "4", "sha256": "0"}}}, "of 'a' it has no bytes and sha256"),
        ({"files": {"a": 4}}, "of 'a' it has no bytes and sha256"),
        ({"files": []}, "files is []"),
        ({"metrics": 1}, "metrics is 1"),
        ({"metric": {}}, "unknown field 'metric': did you mean 'metrics'?"),
        ({"stage": "left out"}, "it has no 'stage'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"parent": "x" * 5000}, "no path"),
        ({"parent": "a/" + "x" * 300}, "no path"),
        ({"config": json.loads("[" * 200 + "]" * 200)}, "nested more than 32"),
    ],
)
def test_manifests(tmp_path: Path, values: dict, words: str) -> None:
    folder = sealed(tmp_path / "stage", **values)
    one_line(lambda: artifact.read_manifest(folder), "sqft.json is corrupt", words)


def test_a_metric_may_be_nan_or_very_large(tmp_path: Path) -> None:
    size = 3**224  # of a search space
    assert artifact.read_manifest(sealed(tmp_path, metrics={"space": size})).metrics == {"space": size}
    assert str(artifact.read_manifest(sealed(tmp_path, metrics={"loss": float("nan")})).metrics["loss"]) == "nan"


def test_overwriting_a_strangers_folder_removes_nothing_outside(tmp_path: Path) -> None:
    kept = put(tmp_path / "other" / "kept", "kept")
    entry = {"bytes": 4, "sha256": "0"}
    for number, files in enumerate(({"../other/kept": entry}, {"link": entry}, {"link": entry, "file": entry}, {})):
        out = sealed(tmp_path / f"out{number}", files=files)
        (out / "link").symlink_to(kept.parent)
        (out / "file").symlink_to(kept)
        with artifact.stage("save", None, out, overwrite=True) as made:
            put(made.folder / "new", "new")
        assert kept.read_text() == "kept" and [file.name for file in kept.parent.iterdir()] == ["kept"]
        assert (out / "new").read_text() == "new"


def test_links_beside_an_output_are_not_followed(tmp_path: Path) -> None:
    kept = put(tmp_path / "other" / "kept", "kept")
    (tmp_path / ".out.sqft-writing").symlink_to(kept.parent)
    (tmp_path / ".table.md.sqft-writing").symlink_to(kept)
    with artifact.stage("save", None, tmp_path / "out") as made:
        put(made.folder / "new", "new")
    artifact.write_text(tmp_path / "table.md", "table")
    assert [file.name for file in kept.parent.iterdir()] == ["kept"] and kept.read_text() == "kept"
    (tmp_path / ".next.sqft-lock").symlink_to(kept.parent / "made")
    with pytest.raises(SqftError, match="cannot write"), artifact.stage("save", None, tmp_path / "next"):
        pass
    with artifact.stage("train", None, tmp_path / "more", key="0123456789abcdef") as made:
        (tmp_path / ".more.training-0123456789ab").symlink_to(kept.parent)
        with pytest.raises(SqftError, match="is a link"):
            made.work("training")
        put(made.folder / "new", "new")
    assert [file.name for file in kept.parent.iterdir()] == ["kept"]


def test_a_recipe_does_not_follow_a_link_out_of_its_output(tmp_path: Path, dense: Path) -> None:
    elsewhere = sealed(tmp_path / "elsewhere")
    before = sorted(file.name for file in elsewhere.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sparsify").symlink_to(elsewhere)
    recipe = Recipe(str(dense), str(tmp_path / "run"), {"sparsify": SparsifyConfig(method="magnitude")})
    one_line(lambda: run(recipe), "is a link to", "outside of", kind=UsageError)
    assert sorted(file.name for file in elsewhere.iterdir()) == before


TASK = {"folder": "x", "splits": {"test": "test"}, "prompt": "{{ q }}", "answer": "a"}


def task(at: Path, rows: int = 2, **changes) -> Any:
    put(at / "x" / "test.jsonl", '{"q": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", "a": "1"}\n' * rows)
    return get_task(str(put(at / "t.yaml", yaml.safe_dump({**TASK, **changes}))), at)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"folder": "../x"}, "without '..'"),
        ({"folder": "/x"}, "without '..'"),
        ({"name": "../../x"}, "without '..'"),
        ({"files": {"test": "../../secret"}}, "without '..'"),
        ({"hub": "../x"}, "hub is '../x'"),
        ({"hub": "/etc/x.txt"}, "hub is"),
        ({"extract": "(" * 3000}, "not a regular expression"),
        ({"extract": "a{99999999999999}"}, "not a regular expression"),
        ({"max_new_tokens": 10**12}, "between 1 and 1048576"),
        ({"max_new_tokens": 1e300}, "max_new_tokens"),
        ({"splits": {"test": [1]}}, "'[1]' is no split"),
    ],
)
def test_tasks(tmp_path: Path, changes: dict, words: str) -> None:
    one_line(lambda: task(tmp_path, **changes).examples("test"), words, kind=UsageError)


ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ q|regex_replace('(a+)+$', '') }}",
    "{{ lipsum(n=100000000) }}",
]
LARGE = [
    "{{ 'a' * 10**10 }}",
    "{{ q * 10**9 }}",
    "{{ q|center(10**10) }}",
    "{{ '%10000000000d' % 3 }}",
    "{{ '{:10000000000}'.format(3) }}",
    "{% set l = [0] %}{% for i in range(99) %}{% set _ = l.extend(l) %}{% endfor %}",
    "{{ [q] * 10**9 }}",
    "{{ q.replace('', q * 10**7) }}",
    "{{ q.ljust(10**10) }}",
    "{{ ([q] * 10000000)|join }}",
]
REFUSED = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 9**(9**9) }}",
    "{{ 'x' * 2000000 }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ q.__class__.__mro__[1].__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{{ nothing }}",
]


@pytest.mark.parametrize("template", ENDLESS + LARGE + REFUSED)
def test_templates_that_take_too_much(tmp_path: Path, template: str) -> None:
    found = task(tmp_path, prompt=template)
    started = time.monotonic()
    text = one_line(lambda: found.examples("test"), "task t: ", kind=UsageError)
    if template in ENDLESS:
        assert f"took more than {SECONDS:g} s" in text
    elif template in LARGE:
        assert "too much memory" in text or "took more" in text
    assert time.monotonic() - started < 30  # of a machine that does other things; the limit is of processor time


def test_templates_write_no_file_and_leave_no_process(tmp_path: Path) -> None:
    before = set(psutil.Process().children())  # of other tests
    for template in ("{{ q }}", ENDLESS[0]):
        found = task(tmp_path, prompt=template)
        try:
            assert [example.prompt for example in found.examples("test")] == ["a" * 35 + "!"] * 2
        except UsageError:
            assert template != "{{ q }}"
        assert set(psutil.Process().children()) <= before


def test_texts_come_back_as_they_were_made(tmp_path: Path) -> None:
    odd = {"q": "é\u2028\ud800\x00 \"'", "a": 1e22}
    put(tmp_path / "x" / "test.jsonl", "")
    found = task(tmp_path, rows=1, prompt="{{ q }}|{{ a }}", completion="{{ a }}")
    (tmp_path / "x" / "test.jsonl").write_text((json.dumps(odd) + "\n") * 100)
    made = found.examples("test", 70)
    assert len(made) == 70 and {(e.prompt, e.completion, e.answer, e.task) for e in made} == {
        (f"{odd['q']}|1e+22", "1e+22", "1e+22", "t")
    }


def test_a_pattern_that_backtracks_is_stopped(tmp_path: Path) -> None:
    found = task(tmp_path, extract="(a+)+$")
    (example, _) = found.examples("test")
    assert found.is_correct("1", found.examples("test")[0]) is False
    one_line(lambda: found.is_correct("a" * 40 + "!", example), "takes more than", kind=UsageError)
    assert task(tmp_path, extract="([0-9]+)").is_correct("so 1", example)


def test_records_of_training(tmp_path: Path) -> None:
    for text in ('{"records": 3}', '{"records": [[1]]}', "[]", '{"records": [[["x"], 1]]}', "[" * 10_000):
        put(tmp_path / RECORDS, text)
        one_line(lambda: read_rank_records(tmp_path), "is corrupt")


def test_chat_templates(tmp_path: Path) -> None:
    """The same tokens as transformers gives, or one line."""
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = "<bos>{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    messages = [{"role": "user", "content": "2 + 2"}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    assert torch.equal(_tokens(tokenizer, "2 + 2", GenerateConfig()), theirs)
    for template in (ENDLESS[0], LARGE[0], REFUSED[1], "{{ raise_exception('no') }}", "{{ nothing.x }}"):
        tokenizer.chat_template = template
        one_line(lambda: _tokens(tokenizer, "2 + 2", GenerateConfig()), "chat template", kind=UsageError)
