"""Weights of another dtype, or of a GGUF file, from disk to disk: what is converted need not fit into memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sqft.models.bounds import check_config
from sqft.models.dense import DTYPES, locate, quant_method, skeleton
from sqft.models.gguf import dequantized
from sqft.models.reader import SafetensorsReader
from sqft.models.tensors import MAX_SHARD_BYTES, ModelWriter, copy_settings, same
from sqft.processes import count


class _Conversion(NamedTuple):
    """What is written (on device ``meta``), from what, and what is written besides."""

    planned: Mapping[str, Tensor]
    tensors: Iterable[tuple[str, Tensor]]
    settings: Callable[[Path], object]


def converted(source: str | Path, dtype: str, out: Path) -> str | Path:
    """``source``, or a copy in ``out`` whose float tensors are of ``dtype``, written one after the other, to be mapped
    like any other model. A GGUF file is de-quantized in the same way (``auto``: to float32).

    ``source`` itself where there is nothing to convert, in several processes, and for what is neither a folder of float
    safetensors nor a GGUF file whose tensors are the model's, one by one (experts are not): transformers then converts
    while it loads. What a family keeps in float32 is not converted here, so both give the same bits.
    """
    folder, gguf = locate(source)
    if count() > 1 or not Path(folder).is_dir():
        return source
    found = _folder(Path(folder), dtype) if gguf is None else _gguf(Path(folder) / gguf, dtype)
    if found is None:
        return source
    if not out.is_dir():
        temporary = out.with_name(f"{out.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        found.settings(temporary)
        writer = ModelWriter(found.planned, temporary, MAX_SHARD_BYTES)
        for name, tensor in found.tensors:
            writer.add(name, tensor, same)
        writer.close()
        temporary.rename(out)
    return out


def _folder(folder: Path, dtype: str) -> _Conversion | None:
    if dtype == "auto" or quant_method(folder):
        return None
    reader = SafetensorsReader(folder, read_only=True)
    check_config(folder, reader.layout)
    planned = _planned(skeleton(folder), reader.layout, DTYPES[dtype])
    if all(planned[name].dtype == tensor.dtype for name, tensor in reader.layout.items()):
        return None
    return _Conversion(planned, reader, lambda out: copy_settings(folder, out))


def _gguf(file: Path, dtype: str) -> _Conversion | None:
    model = skeleton(file)
    weights, found = dict(model.named_parameters()), dequantized(file, model)  # of tied ones the first
    if found is None or not weights.keys() <= found[0]:
        return None
    planned = _planned(model, weights, torch.float32 if dtype == "auto" else DTYPES[dtype])
    tensors = ((name, tensor) for name, tensor in found[1] if name in planned)
    return _Conversion(planned, tensors, model.config.save_pretrained)


def _planned(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() and not any(part in name for part in kept) else tensor
        for name, tensor in tensors.items()
    }
