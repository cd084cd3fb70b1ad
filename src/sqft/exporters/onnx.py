"""ONNX for onnxruntime-genai, by its own model builder, from a GPTQ folder of ours: ``MatMulNBits`` of our integers.

The head stays as it is (the builder would quantize it again), and products are computed in float32 (accuracy level 1):
the default rounds activations to 8 bits, which moves logits by per cents. ``verify`` reads the file and compares.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sqft.errors import SqftError, VerificationError
from sqft.exporters.source import NOT_EXACT, Rewriting, Source, check_weights, need_bits
from sqft.formats.gptq import GPTQ
from sqft.models.reader import Reader
from sqft.quantization.linear import QuantLinear

HEAD = "/lm_head/MatMul"
FUSED = {"q_proj": 0, "k_proj": 1, "v_proj": 2}  # places in what the builder joins to qkv_proj


class Onnx:
    def check(self, reader: Reader) -> list[str]:
        try:
            import onnx  # noqa: F401  # pyright: ignore[reportMissingImports]
            import onnxruntime_genai  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise SqftError(
                "an export to ONNX is made by onnxruntime-genai: pip install onnxruntime-genai onnx onnx-ir"
            ) from None
        source = Source(reader)
        need_bits(source, "onnxruntime-genai", (4, 8), (32, 64, 128))
        for module, layer in source.layers():
            if int(layer.grid().zero_OG.min()) == 0:
                raise SqftError(f"{module} has a zero point of 0, which onnxruntime-genai would misread in GPTQ v1: "
                                "quantize again, symmetric or with --min-zero 1")  # fmt: skip
        return []

    def write(self, reader: Reader, out: Path) -> None:
        source = Source(reader)
        (work := out / ".gptq").mkdir()
        if source.settings is not None:
            layers = {name: source.layer(name) for name in source.packed[:1]}
            Rewriting(source, _gptq, GPTQ.make_config(layers, (), "gptq"), None).write(work)
        else:
            Rewriting(source, _gptq, None, None).write(work)
        precision = "fp32" if source.settings is None else f"int{source.settings.bits}"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "model", "-i", str(work), "-o",
                   str(out), "-p", precision, "-e", "cpu", "-c", str(work / "cache")]  # fmt: skip
        command += ["--extra_options", f"nodes_to_exclude={HEAD},/model/embed_tokens/Gather", "accuracy_level=1",
                    *(["shared_embeddings=true"] if source.config.get("tie_word_embeddings") else [])]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        shutil.rmtree(work)
        if done.returncode or not (out / "model.onnx").is_file():
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no model was written"]
            raise SqftError(f"onnxruntime-genai's builder does not take this model: {last[0].strip()}")

    def verify(self, reader: Reader, out: Path) -> dict[str, Any]:
        import onnx  # pyright: ignore[reportMissingImports]

        source, size = Source(reader), sum(file.stat().st_size for file in out.glob("model.onnx*"))
        if source.settings is None:
            return {"bytes": size}
        held = {t.name: t for t in onnx.load(str(out / "model.onnx")).graph.initializer}
        to_array, bits = onnx.numpy_helper.to_array, source.settings.bits

        def weight(module: str) -> Tensor:
            for name, rows in _places(source, module):
                if f"{name}.qweight" in held:
                    q, scale, zero = (to_array(held[f"{name}.{leaf}"]) for leaf in ("qweight", "scales", "qzeros"))
                    return torch.from_numpy(_multiplied(q, scale, zero, bits)[rows])
            raise VerificationError(f"{module} is not in the ONNX file: {NOT_EXACT}")

        for name in source.floats:
            tensor = source.reader.get(name).float()
            if tensor.ndim == 2 and not any(_holds(to_array(t), tensor.numpy()) for t in held.values()):
                raise VerificationError(f"{name} was not written exactly: {NOT_EXACT}")
        return {"weights": check_weights(source, weight), "bytes": size}


def _holds(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> bool:
    """Whether one is the other, or turned."""
    return any(each.shape == wanted.shape and np.array_equal(each, wanted) for each in (found, found.T))


def _gptq(layer: QuantLinear) -> Mapping[str, Tensor]:
    return GPTQ.encode(layer, "gptq")


def _places(source: Source, module: str) -> Iterator[tuple[str, slice]]:
    """Where the builder may have put a module, and which rows there are its own."""
    path, _, leaf = module.replace(".self_attn.", ".attn.").rpartition(".")
    yield f"{path}.{leaf}.MatMulNBits", slice(None)
    if leaf in FUSED:
        parent = module.rpartition(".")[0]
        rows = [source.layer(f"{parent}.{name}").out_features for name in FUSED]
        begin = sum(rows[: FUSED[leaf]])
        yield f"{path}.qkv_proj.MatMulNBits", slice(begin, begin + rows[FUSED[leaf]])


def _multiplied(q_OGB: Any, scales: Any, zeros: Any, bits: int) -> np.ndarray[Any, Any]:
    """float32 [O, I] of MatMulNBits' constants: bytes of integers by group, low half first; zero points likewise."""
    outputs, groups = q_OGB.shape[:2]
    fields = _fields(q_OGB, bits)
    zero = _fields(zeros.reshape(outputs, -1), bits)[:, :groups, None]
    return ((fields.astype(np.float32) - zero) * scales.reshape(outputs, groups, 1).astype(np.float32)).reshape(
        outputs, -1
    )


def _fields(data: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    return data if bits == 8 else np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], -1)
