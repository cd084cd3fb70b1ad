"""Headers of GGUF files: what the parser of ``gguf`` would follow for minutes, or into memory that is not there."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from pico import pico_folder

import sqft
from sqft.errors import SqftError
from sqft.models.dense import load_dense, load_tokenizer, skeleton
from sqft.models.gguf import parsed_once, read_layout


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def whole(
    values: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (1, 1), data: bytes = b"\0" * 64
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + values + tensors + data


def number(name: bytes, value: int) -> bytes:
    return text(name) + struct.pack("<II", 4, value)


def tensor(name: bytes, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LAYERS = number(b"llama.block_count", 1)
ONE = tensor(b"a", 4, 2)
WRONG = {
    "magic": (b"GGUX" + whole()[4:], "it is not GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + b"\0" * 99, "it is not GGUF"),
    "cut": (whole(LAYERS, ONE)[:30], "it is cut off"),
    "nothing": (b"", "cannot be read"),
    "tensors": (whole(LAYERS, ONE, (2**40, 1)), "1,099,511,627,776 tensors"),
    "values": (whole(LAYERS, ONE, (1, 2**40)), "values: expected at most"),
    "name": (whole(struct.pack("<Q", 2**50) + b"x" * 99), "a text has"),
    "list": (whole(text(b"a") + struct.pack("<IIQ", 9, 0, 2**22 + 1)), "its lists have"),
    "list of texts": (whole(text(b"a") + struct.pack("<IIQ", 9, 8, 2**20)), "cut off"),
    "list of lists": (whole(text(b"a") + struct.pack("<IIQ", 9, 9, 2)), "a list of lists"),
    "type": (whole(text(b"a") + struct.pack("<II", 77, 2)), "a value of type 77"),
    "layers": (whole(number(b"llama.block_count", 10**6), ONE), "layers is 1000000: expected 0 to 1"),
    "experts": (whole(number(b"llama.expert_count", 10**6), ONE), "experts is 1000000"),
    "width": (whole(number(b"llama.embedding_length", 2**31), ONE), "embedding_length is 2147483648"),
    "twice": (whole(LAYERS, ONE + ONE, (2, 1)), "a is there twice"),
    "dimensions": (whole(LAYERS, text(b"a") + struct.pack("<I", 2**31)), "2147483648 dimensions"),
    "shape": (whole(LAYERS, tensor(b"a", 0, 2**63)), "has the shape"),
    "kind": (whole(LAYERS, tensor(b"a", 4, kind=200)), "the type 200"),
    "weights": (whole(LAYERS, tensor(b"a", 4096, 4096)), "more weights than the file"),
    "offset": (whole(LAYERS, tensor(b"a", 4, offset=2**60)), "more weights than the file"),
    "overlapping": (whole(LAYERS, b"".join(tensor(bytes([97 + n]), 4, 4) for n in range(9)), (9, 1)), "more weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("use", [read_layout, load_dense, load_tokenizer, skeleton])
def test_wrong_headers_are_one_line(name: str, use: Callable[[Path], object], tmp_path: Path) -> None:
    data, said = WRONG[name]
    (file := tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(SqftError) as refused:
        use(file)
    assert said in str(refused.value) and str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_right_passes(tmp_path: Path) -> None:
    (file := tmp_path / "m.gguf").write_bytes(whole(LAYERS, tensor(b"a", 4, 2) + tensor(b"b", 32, kind=2), (2, 1)))
    assert {name: list(found.shape) for name, found in read_layout(file).items()} == {"a": [2, 4], "b": [32]}


def test_a_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    sqft.export(pico_folder(tmp_path / "dense"), sqft.ExportConfig(to="gguf"), out=tmp_path / "out")
    opened: list[str] = []
    parser = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: opened.append(path) or parser(path))
    spied = gguf.GGUFReader
    file = tmp_path / "out" / "model.gguf"
    load_dense(file)
    assert opened == [str(file)] and gguf.GGUFReader is spied
    with parsed_once(file):
        load_dense(file)
        load_dense(tmp_path / "out")
    assert len(opened) == 2  # nothing is kept from before
    with pytest.raises(ZeroDivisionError), parsed_once(file):
        raise ZeroDivisionError
    assert gguf.GGUFReader is spied
