"""Weights of another dtype, from disk to disk: a model that is converted need not fit into memory."""

from __future__ import annotations

import shutil
from pathlib import Path

from sqft.models.bounds import check_config
from sqft.models.dense import DTYPES, locate, quant_method, skeleton
from sqft.models.reader import SafetensorsReader
from sqft.models.tensors import MAX_SHARD_BYTES, ModelWriter, copy_settings
from sqft.processes import count


def converted(source: str | Path, dtype: str, out: Path) -> str | Path:
    """``source``, or a copy in ``out`` whose float tensors are of ``dtype``, written one after the other, to be mapped
    like any other model.

    ``source`` itself where there is nothing to convert, in several processes, and for what is no folder of float
    safetensors: transformers then converts while it loads. What a family keeps in float32 is not converted here, so
    both give the same bits.
    """
    folder, gguf = locate(source)
    if dtype == "auto" or gguf or count() > 1 or not Path(folder).is_dir() or quant_method(folder):
        return source
    reader = SafetensorsReader(folder, read_only=True)
    check_config(folder, reader.layout)
    model = skeleton(folder)
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    planned = {
        name: tensor.to(DTYPES[dtype])
        if tensor.is_floating_point() and not any(part in name for part in kept)
        else tensor
        for name, tensor in reader.layout.items()
    }
    if all(planned[name].dtype == tensor.dtype for name, tensor in reader.layout.items()):
        return source
    if not out.is_dir():
        temporary = out.with_name(f"{out.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        copy_settings(Path(folder), temporary)
        writer = ModelWriter(planned, temporary, MAX_SHARD_BYTES)
        for name, tensor in reader:
            writer.add(name, tensor.to(planned[name].dtype))
        writer.close()
        temporary.rename(out)
    return out
