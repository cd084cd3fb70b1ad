"""The Hugging Face folder itself: every tensor bit for bit, settings and tokenizer, without what only sqft reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqft.errors import SqftError
from sqft.models.reader import Reader, SafetensorsReader, check_equal
from sqft.models.tensors import MAX_SHARD_BYTES, ModelWriter, copy_settings


class Transformers:
    """A lossless copy, for tools that take such a folder but stumble over files that they do not know."""

    def check(self, reader: Reader) -> list[str]:
        if not (reader.folder / "config.json").is_file():
            raise SqftError(f"{reader.folder} has no config.json: it is not a model folder")
        return []

    def write(self, reader: Reader, out: Path) -> None:
        writer = ModelWriter(reader.layout, out, MAX_SHARD_BYTES)
        for name in reader.layout:
            writer.add(name, reader.get(name))
        writer.close()
        copy_settings(reader.folder, out)

    def verify(self, reader: Reader, out: Path) -> dict[str, Any]:
        return {"tensors": len(reader.layout), "bytes": check_equal(reader, SafetensorsReader(out))}
