"""A GGUF file: its header, what it may ask for before its parser makes an object of each thing listed; and its weights.

Layout (GGUF 2 and 3, little-endian): ``GGUF``, version u32, tensors u64, values u64; each value a name, a type and
itself; each tensor a name, dimensions, a type and the offset of its data, which lies behind the header.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.errors import SqftError, shown
from sqft.models.bounds import LISTED, SIZE, check_number

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number's type
INTEGERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}
TEXT, ARRAY = 8, 9
# transformers' processors that make one weight of one tensor.
ONE_BY_ONE = ("TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor", "NemotronTensorProcessor")
VALUES, NAME, DIMENSIONS = 2**12, 2**12, 4
_LAYERS, _EXPERTS = "block_count", "expert_count"


class _Header:
    """Reads one thing after the other, never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.listed = data, 0, 0

    def skip(self, size: int) -> int:
        """Where ``size`` bytes begin, of which the file has so many."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError("it is cut off, or names more than it has")
        return start

    def number(self, kind: str) -> int:
        return struct.unpack_from(f"<{kind}", self.data, self.skip(struct.calcsize(kind)))[0]

    def text(self, most: int) -> bytes:
        size = self.number("Q")
        if size > most:
            raise ValueError(f"a text has {size:,} bytes: expected at most {most:,}")
        start = self.skip(size)
        return self.data[start : self.at]

    def value(self, kind: int) -> int | None:
        """One value; an integer is returned."""
        if kind in INTEGERS:
            return self.number(INTEGERS[kind])
        if kind == TEXT:
            self.text(SIZE)
        elif kind == ARRAY:
            self.array()
        else:
            self.skip(_size(kind))
        return None

    def array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        self.listed += count
        if self.listed > 4 * LISTED:
            raise ValueError(f"its lists have {self.listed:,} entries: expected at most {4 * LISTED:,}")
        if kind != TEXT:
            self.skip(count * _size(kind))
        else:
            for _ in range(count):
                self.skip(self.number("Q"))


def read_layout(file: Path) -> dict[str, Tensor]:
    """Every tensor without memory (device ``meta``), by its name, in the order of its dimensions in torch. Raises
    SqftError for a header that is cut off, or asks for more than the file has or a model needs."""
    try:
        from gguf import GGML_QUANT_SIZES as BLOCKS
    except ImportError:
        raise SqftError(f"{file} is a GGUF file: pip install 'sqft[gguf]' reads it") from None
    try:
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return dict(_tensors(_Header(data), {int(kind): sizes for kind, sizes in BLOCKS.items()}))
    except (OSError, ValueError) as error:
        raise SqftError(f"{file} cannot be read: {error}") from None


@contextlib.contextmanager
def parsed_once(source: str | Path) -> Iterator[None]:
    """transformers parses a GGUF file for its configuration (twice), its weights and its tokenizer, seconds each time
    for a large vocabulary, and makes the table of names again for every module. In here, if ``source`` is one, both are
    done once."""
    if not (str(source).endswith(".gguf") or any(Path(source).glob("*.gguf"))) or not find_spec("gguf"):
        yield
        return
    import gguf

    theirs = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, call in theirs.items():
        setattr(gguf, name, functools.lru_cache(maxsize=1)(call))
    try:
        yield
    finally:
        for name, call in theirs.items():
            setattr(gguf, name, call)


def dequantized(file: Path, model: Any) -> tuple[set[str], Iterator[tuple[str, Tensor]]] | None:
    """The names of a model's weights that a file has, and each of them, float32, one after the other: de-quantized, and
    its heads permuted back, as transformers does. None for a family of which it makes a weight of several tensors."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as theirs

    try:
        reader = gguf.GGUFReader(str(file))
        family = theirs.read_field(reader, "general.architecture")[0]
        processor = theirs.TENSOR_PROCESSORS.get(family, theirs.TensorProcessor)(config=model.config.to_dict())
        names = theirs.get_gguf_hf_weights_map(model, processor)
    except Exception:  # both packages raise many kinds; loading says which
        return None
    if type(processor).__name__ not in ONE_BY_ONE:
        return None
    there = [tensor for tensor in reader.tensors if tensor.name in names]

    def weights() -> Iterator[tuple[str, Tensor]]:
        for tensor in there:
            try:
                made = processor.process(gguf.dequantize(tensor.data, tensor.tensor_type), tensor.name,
                                         tensor_key_mapping=names, parsed_parameters={})  # fmt: skip
            except (NotImplementedError, ValueError) as error:
                raise SqftError(f"{file}: {tensor.name} cannot be de-quantized: {error}") from None
            yield names[tensor.name], torch.tensor(made.weights)

    return {names[tensor.name] for tensor in there}, weights()


def _tensors(header: _Header, blocks: dict[int, tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
    if header.data[header.skip(4) : 4] != b"GGUF" or header.number("I") not in (2, 3):
        raise ValueError("it is not GGUF of version 2 or 3, little-endian")
    tensors, values = header.number("Q"), header.number("Q")
    if tensors > LISTED or values > VALUES:
        raise ValueError(
            f"it has {tensors:,} tensors and {values:,} values: expected at most {LISTED:,} and {VALUES:,}"
        )
    for _ in range(values):
        name = header.text(NAME).decode(errors="replace").rpartition(".")[2]
        number = header.value(header.number("I"))
        if number is not None:
            check_number("layers" if name == _LAYERS else "experts" if name == _EXPERTS else name, number, tensors)
    names: set[str] = set()
    left = len(header.data)
    for _ in range(tensors):
        name = header.text(NAME).decode(errors="replace")
        dimensions = header.number("I")
        if dimensions > DIMENSIONS or name in names:
            raise ValueError(f"its tensor {shown(name)} is there twice, or has {dimensions} dimensions")
        names.add(name)
        shape = [header.number("Q") for _ in range(dimensions)]
        if max(shape, default=0) > SIZE:
            raise ValueError(f"its tensor {shown(name)} has the shape {shown(shape)}: expected at most {SIZE:,}")
        kind, begin = header.number("I"), header.number("Q")
        if kind not in blocks:
            raise ValueError(f"its tensor {shown(name)} has the type {kind}, which is not known")
        stored = math.prod(shape) // blocks[kind][0] * blocks[kind][1]
        left -= stored
        if left < 0 or begin + stored > len(header.data):
            raise ValueError(f"its tensor {shown(name)} has more weights than the file")
        yield name, torch.empty(shape[::-1], device="meta")


def _size(kind: int) -> int:
    if kind not in SIZES:
        raise ValueError(f"it has a value of type {kind}, which is not known, or a list of lists")
    return SIZES[kind]
