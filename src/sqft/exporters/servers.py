"""Folders in the layouts that servers read: the same integers, scales and zero points, in other words.

``verify`` of each computes the weights from what was written by the target's own formula and compares bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.errors import SqftError
from sqft.exporters.source import Rewriting, Source, check_weights, need_bits
from sqft.formats.checkpoint import resolve
from sqft.kernels.packed import pack_words, unpack_words
from sqft.models.reader import Reader
from sqft.quantization.linear import QuantLinear

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 neighbouring outputs lies in which 4 bits of a word


class Vllm:
    """vLLM (and SGLang): GPTQ v1 for symmetric grids, compressed-tensors for others; floats and scales in float16, to
    which vLLM casts them."""

    def check(self, reader: Reader) -> list[str]:
        source = Source(reader)
        if source.settings is not None:
            symmetric = source.settings.symmetric
            need_bits(source, "vLLM", (4, 8) if symmetric else (4,))
        return source.rounding(torch.float16)

    def _rewriting(self, reader: Reader) -> Rewriting:
        source = Source(reader)
        if source.settings is None:
            return Rewriting(source, _none, None)
        coder, version = resolve("auto", source.settings.symmetric)
        layers = dict.fromkeys(source.packed, source.layer(source.packed[0]))
        quantization = coder.make_config(layers, source.float_linears(), version)
        return Rewriting(source, lambda layer: _kept(coder.encode(layer, version)), quantization)

    def write(self, reader: Reader, out: Path) -> None:
        self._rewriting(reader).write(out)

    def verify(self, reader: Reader, out: Path) -> dict[str, Any]:
        written = Source(self._rewriting(reader).check_floats(out))
        return {"weights": check_weights(Source(reader), lambda m: written.layer(m).dequantize(torch.float32))}


class Awq:
    """AutoAWQ's layout of 4 bits ("gemm"), which vLLM, SGLang and transformers read, asymmetric or not: ``qweight``
    int32 [I, O / 8], ``qzeros`` int32 [G, O / 8], eight outputs a word in an order of their own, ``scales`` [G, O]."""

    def check(self, reader: Reader) -> list[str]:
        source = Source(reader)
        if source.settings is None:
            raise SqftError("AWQ is a layout of INT4 weights, and this model's are floats: quantize it first")
        need_bits(source, "AWQ", (4,))
        return source.rounding(torch.float16)

    def _rewriting(self, reader: Reader) -> Rewriting:
        source = Source(reader)
        assert source.settings is not None
        quantization = {"quant_method": "awq", "bits": 4, "group_size": source.settings.group_size, "zero_point": True,
                        "version": "gemm", "modules_to_not_convert": source.float_linears() or None}  # fmt: skip
        return Rewriting(source, _awq, quantization)

    def write(self, reader: Reader, out: Path) -> None:
        self._rewriting(reader).write(out)

    def verify(self, reader: Reader, out: Path) -> dict[str, Any]:
        written = self._rewriting(reader).check_floats(out)

        def weight(module: str) -> Tensor:
            q_IO, z_GO = (_awq_fields(written.get(f"{module}.{leaf}")) for leaf in ("qweight", "qzeros"))
            scale_GO = written.get(f"{module}.scales").float()
            repeat = q_IO.shape[0] // scale_GO.shape[0]
            return ((q_IO - z_GO.repeat_interleave(repeat, 0)) * scale_GO.repeat_interleave(repeat, 0)).mT

        return {"weights": check_weights(Source(reader), weight)}


class Mlx:
    """MLX's affine layout: ``w = s q + b`` with ``b = -s z``: ``weight`` uint32 [O, I * bits / 32], ``scales`` and
    ``biases`` [O, G] in float16. Symmetric grids are exact; of others those whose scales have 7 bits (11 - bits)."""

    def check(self, reader: Reader) -> list[str]:
        source = Source(reader)
        need_bits(source, "MLX", (2, 4, 8), (32, 64, 128))
        lost = source.rounding(torch.float16)
        worst = max((_offset_error(layer) for _, layer in source.layers()), default=0.0)
        if worst:
            lost.append(f"-s z rounded to float16 changes weights by up to {worst:.2g} (exact: symmetric grids, or "
                        "--scale-bits 7)")  # fmt: skip
        return lost

    def _rewriting(self, reader: Reader) -> Rewriting:
        source = Source(reader)
        if source.settings is None:
            return Rewriting(source, _none, None)
        quantization = {"group_size": source.settings.group_size, "bits": source.settings.bits, "mode": "affine"}
        made = Rewriting(source, _mlx, quantization, key="quantization")
        made.config["quantization_config"] = quantization
        return made

    def write(self, reader: Reader, out: Path) -> None:
        self._rewriting(reader).write(out)

    def verify(self, reader: Reader, out: Path) -> dict[str, Any]:
        source, written = Source(reader), self._rewriting(reader).check_floats(out)
        if source.settings is None:
            return {"weights": 0}
        bits, worst, count = source.settings.bits, 0.0, 0
        for module, layer in source.layers():
            q_OI = unpack_words(written.get(f"{module}.weight").view(torch.int32).mT, layer.in_features, bits).mT
            scale, bias = (written.get(f"{module}.{leaf}").float().repeat_interleave(layer.group_size, 1)
                           for leaf in ("scales", "biases"))  # fmt: skip
            error = (q_OI * scale + bias - layer.dequantize(torch.float32)).abs().max()
            worst, count = max(worst, float(error)), count + q_OI.numel()
        return {"weights": count} | ({"largest_weight_error": worst} if worst else {})


def _none(layer: QuantLinear) -> Mapping[str, Tensor]:
    raise AssertionError("a float model has no packed layers")


def _kept(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {leaf: tensor.detach() for leaf, tensor in tensors.items()}


def _awq(layer: QuantLinear) -> Mapping[str, Tensor]:
    zero_GO = layer.grid().zero_OG.mT
    packed = {"qweight": _awq_words(layer.integers().mT), "qzeros": _awq_words(zero_GO), "scales": layer.scales}
    return packed | ({} if layer.bias is None else {"bias": layer.bias.detach()})


def _awq_words(fields_RO: Tensor) -> Tensor:
    rows = fields_RO.shape[0]
    ordered = fields_RO.reshape(rows, -1, 8)[:, :, list(AWQ_ORDER)].reshape(rows, -1)
    return pack_words(ordered.mT.contiguous(), 4).mT.contiguous()


def _awq_fields(words: Tensor) -> Tensor:
    rows, columns = words.shape
    fields = unpack_words(words.mT, columns * 8, 4).mT.reshape(rows, -1, 8)
    back = torch.empty_like(fields)
    back[:, :, list(AWQ_ORDER)] = fields
    return back.reshape(rows, -1).int()


def _offset(layer: QuantLinear) -> Tensor:
    grid = layer.grid()
    return -grid.scale_OG.double() * grid.zero_OG.double()


def _offset_error(layer: QuantLinear) -> float:
    exact = _offset(layer)
    return float((exact.half().double() - exact).abs().max())


def _mlx(layer: QuantLinear) -> Mapping[str, Tensor]:
    packed = {"weight": layer.qweight.mT.contiguous().view(torch.uint32), "scales": layer.scales.mT.contiguous(),
              "biases": _offset(layer).half().contiguous()}  # fmt: skip
    return packed | ({} if layer.bias is None else {"bias": layer.bias.detach()})
