"""Safetensors files as read-only pages: they count against no limit of memory (``ulimit -d`` counts what may be
written, even if it is not), and the system drops and reads them again as it likes. For models whose weights are
replaced, never changed in place: that would be a fault."""

from __future__ import annotations

import contextlib
import json
import mmap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.models.tensors import TORCH_DTYPES


class Mapped:
    """What ``safe_open`` is to those who ask it for slices of whole tensors."""

    def __init__(self, file: str | Path, **_: Any) -> None:
        from safetensors import safe_open

        safe_open(file, "pt", backend="pread")  # raises for a header that is not right
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            self._header: dict[str, Any] = json.loads(stream.read(size))
            self._header.pop("__metadata__", None)
            self._bytes, self._start = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), 8 + size

    def __exit__(self, *_: Any) -> None:
        """The tensors hold the file."""

    def keys(self) -> list[str]:
        return list(self._header)

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name)

    def get_slice(self, name: str) -> Tensor:
        entry = self._header[name]
        (start, end), dtype = entry["data_offsets"], TORCH_DTYPES[entry["dtype"]]
        if start == end:
            return torch.empty(entry["shape"], dtype=dtype)
        if (self._start + start) % dtype.itemsize:  # lies at no multiple of its size: a copy does
            data = bytearray(self._bytes[self._start + start : self._start + end])
            return torch.frombuffer(data, dtype=dtype).view(entry["shape"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._bytes, dtype=dtype, count=(end - start) // dtype.itemsize,
                                    offset=self._start + start)  # fmt: skip
        return flat.view(entry["shape"])


@contextlib.contextmanager
def read_only() -> Iterator[None]:
    """Within it transformers maps weights so."""
    from transformers import modeling_utils

    usual = modeling_utils.safe_open
    modeling_utils.safe_open = Mapped  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
    try:
        yield
    finally:
        modeling_utils.safe_open = usual  # pyright: ignore[reportPrivateImportUsage]
