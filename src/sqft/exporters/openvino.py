"""OpenVINO's own IR with tokenizer and detokenizer, for OpenVINO GenAI and Model Server.

OpenVINO GenAI makes it from a GGUF file of ours, keeping integers, scales and zero points (its u4 and u8 constants).
``verify`` reads the IR, multiplies its constants out and looks for every weight of the model among them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sqft.errors import SqftError, VerificationError, first_line
from sqft.exporters.gguf import FILE, Gguf
from sqft.exporters.source import NOT_EXACT, Source
from sqft.models.reader import Reader
from sqft.models.tensors import copy_settings

MODEL = "openvino_model.xml"


class _Readable(Gguf):
    kinds = ("Q4_0", "Q4_1", "Q8_0")  # what OpenVINO GenAI reads


class OpenVino:
    def check(self, reader: Reader) -> list[str]:
        try:
            import openvino_genai  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise SqftError("an export to OpenVINO is made by openvino-genai: pip install openvino-genai") from None
        lost = _Readable().check(reader)
        source = Source(reader)
        if source.settings is None and any(t.dtype == torch.bfloat16 for t in reader.layout.values()):
            lost += source.rounding(torch.float16)
        return lost

    def write(self, reader: Reader, out: Path) -> None:
        import openvino_genai  # pyright: ignore[reportMissingImports]

        (work := out / ".gguf").mkdir()
        _Readable().write(reader, work)
        try:
            openvino_genai.LLMPipeline(str(work / FILE), "CPU", enable_save_ov_model=True)
        except Exception as error:  # of another package, in C++: anything may happen
            raise SqftError(f"openvino-genai does not read this model: {first_line(error)}") from error
        for file in work.glob("openvino_*"):
            shutil.move(file, out / file.name)
        shutil.rmtree(work)
        copy_settings(reader.folder, out)
        (out / "quantize_config.json").unlink(missing_ok=True)

    def verify(self, reader: Reader, out: Path) -> dict[str, Any]:
        import openvino  # pyright: ignore[reportMissingImports]

        source, found = Source(reader), Counter[str]()
        for node in openvino.Core().read_model(out / MODEL).get_ops():
            if node.get_type_name() == "MatMul" and (weight := _weight(node.input_value(1).get_node())) is not None:
                found[_digest(weight)] += 1
        for module, layer in source.layers():
            digest = _digest(layer.dequantize(torch.float32).numpy())
            if not found[digest]:
                raise VerificationError(f"the weights of {module} were not written exactly: {NOT_EXACT}")
            found[digest] -= 1
        return {
            "weights": len(source.packed),
            "bytes": sum(file.stat().st_size for file in out.glob("openvino_model.*")),
        }


def _weight(node: Any) -> np.ndarray[Any, Any] | None:
    """float32 [O, I] of the constants that a product's second input is computed from; None: from something else."""
    kind = node.get_type_name()
    if kind == "Constant":
        return _values(node)
    inputs = [node.input_value(index).get_node() for index in range(node.get_input_size())]
    if kind == "Convert":
        return _weight(inputs[0])
    if kind in ("Subtract", "Multiply"):
        one, other = _weight(inputs[0]), _weight(inputs[1])
        if one is None or other is None:
            return None
        return one - other if kind == "Subtract" else one * other
    if kind == "Reshape" and (weight := _weight(inputs[0])) is not None:
        return weight.reshape(weight.shape[0], -1)
    return None


def _values(node: Any) -> np.ndarray[Any, Any]:
    kind, shape = node.get_element_type().get_type_name(), list(node.output(0).shape)
    if kind != "u4":
        return np.array(node.data, dtype=np.float32).reshape(shape)
    packed = np.frombuffer(node.data.tobytes(), dtype=np.uint8)  # the low half of a byte first
    return np.stack([packed & 15, packed >> 4], -1).reshape(-1)[: int(np.prod(shape))].reshape(shape).astype(np.float32)


def _digest(weight: np.ndarray[Any, Any] | Tensor) -> str:
    plain = np.ascontiguousarray(weight, dtype=np.float32) + np.float32(0)  # -0 becomes 0
    return sha256(plain.tobytes()).hexdigest()
