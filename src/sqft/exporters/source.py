"""A model folder as exporters see it: packed layers, floats, settings; and a folder like it in another layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.errors import SqftError, VerificationError
from sqft.formats.compact import coder_of, read_config
from sqft.models.reader import Reader, SafetensorsReader, same_bits
from sqft.models.tensors import MAX_SHARD_BYTES, ModelWriter, copy_settings
from sqft.quantization.linear import QuantLinear

NOT_EXACT = "this is a bug in sqft, please report it; nothing was kept"


class Source:
    """``config``: ``config.json``; ``packed``: names of packed modules; ``floats``: names of all other tensors.
    ``settings`` of the packed ones (None: all are floats)."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.config = reader, read_config(reader.folder)
        self._coded = coder_of(self.config)
        self.settings = self._coded[1] if self._coded else None
        key = f".{self._coded[0].key}" if self._coded else None
        self.packed = [name.removesuffix(key) for name in reader.layout if name.endswith(key)] if key else []
        inside = set(self.packed)
        self.floats = [name for name in reader.layout if name.rpartition(".")[0] not in inside]

    def layer(self, module: str) -> QuantLinear:
        """Raises SqftError for a corrupt one, and one whose columns are not grouped in their order."""
        assert self._coded is not None
        names = [name for name in self.reader.layout if name.rpartition(".")[0] == module]
        layer = self._coded[0].decode(module, {n.rpartition(".")[2]: self.reader.get(n) for n in names}, self._coded[1])
        if not layer.groups_are_contiguous:
            raise SqftError(f"{module} has columns grouped out of order (act-order without static groups), which this "
                            "target does not read: quantize again with sqft, whose groups are static")  # fmt: skip
        return layer

    def layers(self) -> Iterator[tuple[str, QuantLinear]]:
        return ((module, self.layer(module)) for module in self.packed)

    def float_linears(self) -> list[str]:
        """Modules of decoder blocks that stay float although others are packed."""
        return [name.removesuffix(".weight") for name in self.floats
                if re.search(r"\.\d+\..*\.weight$", name) and self.reader.layout[name].ndim == 2]  # fmt: skip

    def rounding(self, dtype: torch.dtype) -> list[str]:
        """What casting everything that is not packed, and the scales, to ``dtype`` loses: a sentence, or nothing."""
        worst, where = 0.0, ""
        for name in self.reader.layout:
            stored = self.reader.layout[name].dtype
            if not stored.is_floating_point or stored == dtype:
                continue
            tensor = self.reader.get(name)
            error = (tensor.to(dtype).double() - tensor.double()).abs().max().item()
            if error > worst:
                worst, where = error, name
        name = str(dtype).removeprefix("torch.")
        return [f"rounding to {name} changes values by up to {worst:.2g} ({where})"] if worst else []


def need_bits(source: Source, target: str, bits: tuple[int, ...], groups: tuple[int, ...] = (-1, 32, 64, 128)) -> None:
    """Raises SqftError for a packed model whose bits or group size the target does not read."""
    settings = source.settings
    if settings is None:
        return
    if settings.bits not in bits or settings.group_size not in groups:
        raise SqftError(
            f"{target} reads {' or '.join(map(str, bits))} bits in groups of {', '.join(map(str, groups))}, and this "
            f"model has {settings.bits} in groups of {settings.group_size}: quantize again (--bits, --group-size)"
        )


Encode = Callable[[QuantLinear], Mapping[str, Tensor]]


class Rewriting:
    """Writes a folder like the source, packed layers in another layout, floats in ``dtype`` (None: as they are)."""

    def __init__(self, source: Source, encode: Encode, quantization: Mapping[str, Any] | None,
                 dtype: torch.dtype | None = torch.float16, key: str = "quantization_config") -> None:  # fmt: skip
        self.source, self.encode, self.dtype = source, encode, dtype
        self.config = {name: value for name, value in source.config.items() if name != "quantization_config"}
        if quantization:
            self.config[key] = dict(quantization)
        if dtype is not None:
            name = str(dtype).removeprefix("torch.")
            self.config |= {"dtype": name, "torch_dtype": name}
        rope = self.config.get("rope_parameters") or {}
        if "rope_theta" in rope:  # transformers 5 has it there alone, and mlx-lm would take its default instead
            self.config["rope_theta"] = rope["rope_theta"]

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.source.floats:
            yield name, self._cast(self.source.reader.get(name))
        for module, layer in self.source.layers():
            for leaf, tensor in self.encode(layer).items():
                yield f"{module}.{leaf}", self._cast(tensor.detach())

    def write(self, out: Path) -> None:
        planned = {name: tensor.to("meta") for name, tensor in self.tensors()}
        writer = ModelWriter(planned, out, MAX_SHARD_BYTES)
        for name, tensor in self.tensors():
            writer.add(name, tensor)
        writer.close()
        copy_settings(self.source.reader.folder, out)
        (out / "quantize_config.json").unlink(missing_ok=True)
        (out / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")

    def check_floats(self, out: Path) -> SafetensorsReader:
        """The reader of what was written, after comparing the tensors that are not packed. Raises VerificationError."""
        written = SafetensorsReader(out)
        for name in self.source.floats:
            if not same_bits(self._cast(self.source.reader.get(name)), written.get(name)):
                raise VerificationError(f"{name} was not written bit for bit: {NOT_EXACT}")
        return written


def check_weights(source: Source, weights: Callable[[str], Tensor]) -> int:
    """Compares what a target's own formula gives, ``weights(module)`` [O, I], with the source's packed weights; returns
    how many. Raises VerificationError unless every one is equal."""
    count = 0
    for module, layer in source.layers():
        if not torch.equal(layer.dequantize(torch.float32), weights(module).float()):
            raise VerificationError(f"the weights of {module} were not written exactly: {NOT_EXACT}")
        count += layer.in_features * layer.out_features
    return count
