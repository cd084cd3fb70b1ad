"""GGUF, for llama.cpp, Ollama and OpenVINO GenAI: one file with tokenizer and chat template, without quantizing again.

An INT weight ``s (q - z)`` becomes blocks of 32 along the input, each with its group's scale (ggml's block types):

    Q4_0: d = s, 4 bits of (q - z) + 8      Q4_1: d = s, m = -s z, 4 bits of q (exact if s z is, in float16)
    Q5_0: d = s, 5 bits of (q - z) + 16     Q8_0: d = s, 8 bits of (q - z)

The smallest that holds every weight of a matrix exactly is taken. Byte j of a block has weight j below and j + 16
above. Embeddings and head whose rows are integers times a scale (``kernels/rows.py``) are Q8_0; floats stay what they
are. ``verify`` de-quantizes the file by gguf-py and compares bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sqft.errors import SqftError, VerificationError
from sqft.exporters.gguf_settings import ARCHITECTURES, heads_of, write_settings
from sqft.exporters.source import NOT_EXACT, Source, need_bits
from sqft.kernels.rows import as_rows
from sqft.models.reader import Reader
from sqft.quantization.linear import QuantLinear

BLOCK = 32
FILE = "model.gguf"
KINDS: tuple[str, ...] = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")


class Gguf:
    """One exporter for llama, mistral, qwen2 and qwen3; ``kinds``: the block types that may be used."""

    kinds: tuple[str, ...] = KINDS

    def check(self, reader: Reader) -> list[str]:
        source = Source(reader)
        if source.config.get("model_type") not in ARCHITECTURES:
            raise SqftError(f"GGUF files of {source.config.get('model_type')} models are not written, only of "
                            f"{', '.join(ARCHITECTURES)}")  # fmt: skip
        need_bits(source, "GGUF", (2, 3, 4, 8))
        for module, layer in source.layers():
            if layer.in_features % BLOCK:
                raise SqftError(f"{module} has {layer.in_features} inputs, and GGUF's blocks are of {BLOCK}")
            kind_of(module, layer, self.kinds)
        write_settings(source, None)
        return []

    def write(self, reader: Reader, out: Path) -> None:
        import gguf

        source = Source(reader)
        writer = gguf.GGUFWriter(out / FILE, ARCHITECTURES[source.config["model_type"]], use_temp_file=True)
        write_settings(source, writer)
        for name, tensor in floats(source):
            if tensor.dtype == torch.bfloat16 and tensor.ndim == 2:
                writer.add_tensor(name, tensor.contiguous().view(torch.uint8).numpy(),
                                  raw_dtype=gguf.GGMLQuantizationType.BF16)  # fmt: skip
            elif (rows := row_blocks(tensor)) is not None and "Q8_0" in self.kinds:
                writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:  # llama.cpp adds and multiplies by vectors in float32
                writer.add_tensor(name, (tensor if tensor.ndim == 2 else tensor.float()).numpy())
        for module, layer in source.layers():
            kind = kind_of(module, layer, self.kinds)
            name, rows = tensor_name(source, f"{module}.weight"), order(source, module, layer.out_features)
            writer.add_tensor(name, blocks(layer, kind)[rows], raw_dtype=gguf.GGMLQuantizationType[kind])
            if layer.bias is not None:
                bias = layer.bias.detach().float()[torch.from_numpy(rows)]
                writer.add_tensor(tensor_name(source, f"{module}.bias"), bias.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def verify(self, reader: Reader, out: Path) -> dict[str, Any]:
        import gguf

        source, kinds = Source(reader), dict.fromkeys(self.kinds, 0)
        written = {tensor.name: tensor for tensor in gguf.GGUFReader(out / FILE).tensors}

        def compare(name: str, expected: Tensor) -> None:
            tensor = written[name]
            found = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
            if not torch.equal(found.reshape(expected.shape).float(), expected.float()):
                raise VerificationError(f"{name} was not written exactly: {NOT_EXACT}")

        for name, tensor in floats(source):
            compare(name, tensor)
        for module, layer in source.layers():
            name = tensor_name(source, f"{module}.weight")
            rows = torch.from_numpy(order(source, module, layer.out_features))
            compare(name, layer.dequantize(torch.float32)[rows])
            kinds[written[name].tensor_type.name] += 1
        return {"file": FILE, "tensors": len(written), "bytes": (out / FILE).stat().st_size,
                **{f"matrices_{kind}": count for kind, count in kinds.items() if count}}  # fmt: skip


def kind_of(module: str, layer: QuantLinear, kinds: tuple[str, ...] = KINDS) -> str:
    """The smallest block type of ``kinds`` that holds a layer exactly. Raises SqftError if none does."""
    scale = layer.grid().scale_OG
    if torch.equal(scale.half().to(scale.dtype), scale):
        low, high = (int(value) for value in levels(layer).aminmax())
        offset = scale.double() * layer.grid().zero_OG.double()
        fits = {"Q4_0": low >= -8 and high <= 7, "Q5_0": low >= -16 and high <= 15, "Q8_0": low >= -128 and high <= 127,
                "Q4_1": layer.bits <= 4 and torch.equal(offset.half().double(), offset)}  # fmt: skip
        found = next((kind for kind in kinds if fits[kind]), None)
        if found is not None:
            return found
    raise SqftError(f"no GGUF block of {', '.join(kinds)} holds {module} exactly: quantize again, symmetric, or with "
                    "--scale-bits 7 (asymmetric)")  # fmt: skip


def levels(layer: QuantLinear) -> Tensor:
    """int16 [O, I]: integers relative to their zero points; 0 where the scale is."""
    grid = layer.grid()
    found = layer.integers().short() - grid.spread(grid.zero_OG, layer.in_features).short()
    return found * (grid.spread(grid.scale_OG, layer.in_features) != 0)


def blocks(layer: QuantLinear, kind: str) -> np.ndarray[Any, Any]:
    """uint8 [O, bytes of a row]: the layer's weight in ggml's blocks."""
    grid, outputs, count = layer.grid(), layer.out_features, layer.in_features // BLOCK
    scale, zero = (grid.spread(each.double(), layer.in_features)[:, ::BLOCK] for each in (grid.scale_OG, grid.zero_OG))
    d = _half(scale)
    if kind == "Q8_0":
        parts = [d, levels(layer).to(torch.int8).view(outputs, count, BLOCK).view(torch.uint8)]
    else:
        shift = {"Q4_0": 8, "Q5_0": 16}.get(kind)
        codes = layer.integers().short() if shift is None else levels(layer) + shift
        codes = codes.view(outputs, count, BLOCK)
        low, high = (codes & 15)[..., : BLOCK // 2], (codes & 15)[..., BLOCK // 2 :]
        parts = [d, (low | (high << 4)).to(torch.uint8)]
        if kind == "Q4_1":
            parts.insert(1, _half(-scale * zero))
        if kind == "Q5_0":
            fifth = ((codes >> 4) & 1).view(outputs, count, 4, 8)
            parts.insert(1, (fifth << torch.arange(8, dtype=torch.int16)).sum(-1).to(torch.uint8))
    return torch.cat(parts, -1).view(outputs, -1).numpy()


def row_blocks(weight_VI: Tensor) -> np.ndarray[Any, Any] | None:
    """uint8 [V, bytes of a row]: a float16 weight in blocks of Q8_0, if its rows are integers times a scale."""
    if weight_VI.dtype != torch.float16 or weight_VI.shape[-1] % BLOCK or (rows := as_rows(weight_VI)) is None:
        return None
    count = weight_VI.shape[1] // BLOCK
    scales, bytes_ = _half(rows.scale_V[:, None].expand(-1, count)), rows.q_VI.view(torch.uint8)
    return torch.cat([scales, bytes_.view(-1, count, BLOCK)], -1).flatten(1).numpy()


def _half(values_OB: Tensor) -> Tensor:
    """uint8 [O, B, 2]: float16, low byte first."""
    return values_OB.half().contiguous()[..., None].view(torch.uint8)


def order(source: Source, module: str, rows: int) -> np.ndarray[Any, Any]:
    """In which order a module's rows lie in the file: of architecture llama those of q and k go in pairs of a head's
    halves, because llama.cpp rotates neighbours."""
    plain = np.arange(rows)
    if ARCHITECTURES[source.config["model_type"]] != "llama" or not module.endswith(("q_proj", "k_proj")):
        return plain
    heads = heads_of(source.config)[0 if module.endswith("q_proj") else 1]
    return plain.reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def tensor_name(source: Source, name: str) -> str:
    """A tensor's name in the file. Raises SqftError if there is none."""
    names = _names(ARCHITECTURES[source.config["model_type"]], source.config["num_hidden_layers"])
    if (found := names.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
        raise SqftError(f"GGUF has no place for {name}")
    return found


@functools.lru_cache(1)
def _names(architecture: str, layers: int) -> Any:
    import gguf

    known = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(known, layers)


def floats(source: Source) -> Iterator[tuple[str, Tensor]]:
    """What is not packed, by its name in the file."""
    for name in source.floats:
        tensor, module = source.reader.get(name), name.rpartition(".")[0]
        rows = torch.from_numpy(order(source, module, tensor.shape[0]))
        yield tensor_name(source, name), tensor[rows]
