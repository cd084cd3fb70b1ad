"""The Hugging Face folder itself: every tensor bit for bit, settings and tokenizer, without what only sqft reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.artifact import MANIFEST
from sqft.errors import SqftError, VerificationError
from sqft.models.reader import Reader, SafetensorsReader
from sqft.models.tensors import INDEX, MAX_SHARD_BYTES, ModelWriter

# Not settings or a tokenizer: weights, code, and sqft's own.
LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py", ".html")
OWN = (MANIFEST, "probe.json", INDEX)
TEMPLATES = "additional_chat_templates"


class HuggingFace:
    """A lossless copy, for tools that take such a folder but stumble over files that they do not know."""

    def check(self, reader: Reader) -> None:
        if not (reader.folder / "config.json").is_file():
            raise SqftError(f"{reader.folder} has no config.json: it is not a model folder")

    def write(self, reader: Reader, out: Path) -> None:
        writer = ModelWriter(reader.layout, out, MAX_SHARD_BYTES)
        for name in reader.layout:
            writer.add(name, reader.get(name))
        writer.close()
        for file in reader.folder.iterdir():
            if file.is_file() and file.suffix not in LEFT_OUT and file.name not in OWN and file.name[0] != ".":
                shutil.copyfile(file, out / file.name)
        if (reader.folder / TEMPLATES).is_dir():
            shutil.copytree(reader.folder / TEMPLATES, out / TEMPLATES)

    def verify(self, reader: Reader, out: Path) -> dict[str, Any]:
        written = SafetensorsReader(out)
        if written.layout.keys() != reader.layout.keys():
            raise VerificationError(f"{len(written.layout)} of {len(reader.layout)} tensors were written: "
                                    "nothing was kept; this is a bug in sqft, please report it")  # fmt: skip
        size = 0
        for name in reader.layout:
            one, other = reader.get(name), written.get(name)
            if one.dtype != other.dtype or one.shape != other.shape or not torch.equal(_bytes(one), _bytes(other)):
                raise VerificationError(f"{name} was not written bit for bit: nothing was kept; this is a bug in sqft, "
                                        "please report it")  # fmt: skip
            size += one.numel() * one.element_size()
        return {"tensors": len(written.layout), "bytes": size}


def _bytes(tensor: Tensor) -> Tensor:
    """So that NaN equals NaN, and 0 is not -0."""
    return tensor.contiguous().view(-1).view(torch.uint8)
