"""Reads a folder's weights lazily: names, shapes and dtypes at once, a tensor's data when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sqft.errors import SqftError, VerificationError, shown
from sqft.models.mapping import Mapped
from sqft.models.tensors import INDEX, SINGLE_FILE, TORCH_DTYPES
from sqft.strict import plain_name, read_object


class Reader(Protocol):
    """Any weight folder. ``layout``: names, shapes and dtypes, as tensors on ``meta``."""

    folder: Path
    layout: Mapping[str, Tensor]

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU. Raises SqftError if it cannot be read."""
        ...


class SafetensorsReader:
    """``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists; or the file that is named in
    the place of a folder. Tensors are mapped, not read; with ``read_only`` they must not be changed. Raises SqftError
    naming the file unless every one is there, readable, and as long as its header says."""

    def __init__(self, folder: str | Path, read_only: bool = False) -> None:
        self.folder = Path(folder)
        self._file_of: dict[str, Path] = {}  # by tensor
        self._streams: dict[Path, Any] = {}
        self._read_only = read_only
        self.layout: Mapping[str, Tensor] = {
            name: tensor for file in _weight_files(self.folder) for name, tensor in self._open(file)
        }

    def _open(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        if not file.is_file():
            raise SqftError(f"{self.folder} lacks {file.name}, which its index lists: the model is incomplete")
        try:
            stream = safe_open(file, "pt", backend="pread")
            for name in stream.keys():  # noqa: SIM118
                part = stream.get_slice(name)
                dtype = TORCH_DTYPES.get(part.get_dtype()) or stream.get_tensor(name).dtype
                self._file_of[name] = file
                yield name, torch.empty(part.get_shape(), dtype=dtype, device="meta")
        except (
            SafetensorError,
            OSError,
            ValueError,
            RuntimeError,
            TypeError,
        ) as error:  # a shape or kind that torch lacks
            raise SqftError(f"{file} is corrupt or truncated ({error}): fetch or write the model again") from None

    def get(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        if name not in self._file_of:
            raise SqftError(f"{self.folder} has no tensor {name}")
        file = self._file_of[name]
        try:
            if file not in self._streams:
                self._streams[file] = Mapped(file) if self._read_only else safe_open(file, "pt")
            return self._streams[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise SqftError(f"{name} of {self.folder} cannot be read ({error})") from None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.get(name)) for name in self.layout)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and every bit are equal: NaN equals NaN, and 0 is not -0."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(_bytes(one), _bytes(other))


def digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and every bit."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(_bytes(tensor.detach().cpu()).numpy().data)
    return found.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def check_equal(one: Reader, other: Reader) -> int:
    """Bytes of all tensors. Raises VerificationError unless both have the same ones, bit for bit."""
    advice = "nothing was kept; this is a bug in sqft, please report it"
    if one.layout.keys() != other.layout.keys():
        raise VerificationError(f"{len(other.layout)} of {len(one.layout)} tensors were written: {advice}")
    for name in one.layout:
        if not same_bits(one.get(name), other.get(name)):
            raise VerificationError(f"{name} was not written bit for bit: {advice}")
    return sum(tensor.nbytes for tensor in one.layout.values())


def _weight_files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(read_object(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise SqftError(f"{index} is corrupt or truncated ({error}): fetch or write the model again") from None
        if outside := [name for name in names if not plain_name(name)]:
            raise SqftError(f"{index} lists {shown(outside[0])}, which is no file of this folder: it is not read")
        return sorted(folder / name for name in names)
    if not (folder / SINGLE_FILE).is_file():
        other = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        hint = f"; {other[0].name} is a pickle file, which sqft does not load: convert it" if other else ""
        raise SqftError(f"{folder} has no {SINGLE_FILE}{hint}")
    return [folder / SINGLE_FILE]
