"""Writes a model's weights tensor by tensor, in any order, holding none of them.

A safetensors file starts with a header that gives every tensor's place, and names, shapes and dtypes are known before
any weight is computed. So the headers are written first and each tensor then goes straight to its place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from sqft.errors import SqftError
from sqft.keys import MANIFEST

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_DTYPES = {  # by safetensors' names
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U32": torch.uint32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
MAX_SHARD_BYTES = 5 * 10**9
PIECE = 2**22  # elements of a tensor that is changed while it is written
# What copy_settings leaves out: weights, code, and sqft's own.
_LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py", ".html")
_OWN = (MANIFEST, "probe.json", INDEX)
_TEMPLATES = "additional_chat_templates"


def layout(model: nn.Module) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a model's state dict, tied tensors once, as tensors without data (device 'meta')."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: tensor.to("meta") for name, tensor in model.state_dict().items() if name not in tied}


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Some rows after the others, so that what is made of each is small."""
    return tensor.split(max(1, PIECE * len(tensor) // tensor.numel())) if tensor.numel() > PIECE else (tensor,)


def same(rows: Tensor) -> Tensor:
    return rows


class ModelWriter:
    """``model.safetensors``, or several numbered files of at most ``max_shard_size`` bytes and their index. ``tensors``
    gives names, shapes and dtypes, as ``layout(model)`` does."""

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path, max_shard_size: int) -> None:
        self.folder = folder
        self._tensors = dict(tensors)
        self._missing = set(self._tensors)
        self._places: dict[str, tuple[str, int]] = {}  # file, and offset in it
        shards = self._plan(max_shard_size)
        try:
            for file, names in shards.items():
                self._write_header(file, names)
            if len(shards) > 1:
                total = sum(tensor.nbytes for tensor in self._tensors.values())
                weight_map = {name: file for name, (file, _) in self._places.items()}
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        except OSError as error:
            raise _cannot_write(folder / SINGLE_FILE, error) from error

    def _plan(self, max_shard_size: int) -> dict[str, list[str]]:
        groups: list[list[str]] = [[]]
        filled = 0
        for name, tensor in self._tensors.items():
            if groups[-1] and filled + tensor.nbytes > max_shard_size:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += tensor.nbytes
        count = len(groups)
        files = [SINGLE_FILE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors"
                                                          for i in range(1, count + 1)]  # fmt: skip
        return dict(zip(files, groups, strict=True))

    def _write_header(self, file: str, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        *starts, end = accumulate((self._tensors[name].nbytes for name in names), initial=0)
        for name, start in zip(names, starts, strict=True):
            tensor = self._tensors[name]
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape),
                            "data_offsets": [start, start + tensor.nbytes]}  # fmt: skip
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (self.folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        self._places |= {name: (file, 8 + len(text) + start) for name, start in zip(names, starts, strict=True)}

    def add(self, name: str, tensor: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> None:
        """Writes one tensor to its place (a tied one's second name is passed over), or what ``change`` makes of its
        rows, some at a time, in the dtype that was planned. SqftError on a full disk."""
        if name not in self._places:
            return
        (file, offset), expected = self._places[name], self._tensors[name]
        parts = [tensor] if change is None else (change(rows).to(expected.dtype) for rows in pieces(tensor))
        try:
            with (self.folder / file).open("r+b") as stream:
                stream.seek(offset)
                for part in parts:
                    if tensor.shape != expected.shape or part.dtype != expected.dtype:
                        raise SqftError(f"{name} is {part.dtype} {tuple(tensor.shape)}, planned was {expected.dtype} "
                                        f"{tuple(expected.shape)}")  # fmt: skip
                    stream.write(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise _cannot_write(self.folder / file, error) from error
        self._missing.discard(name)

    def close(self) -> None:
        """Raises SqftError if a tensor was never added."""
        if self._missing:
            raise SqftError(f"{len(self._missing)} tensors were not written, e.g. {min(self._missing)}")


def _cannot_write(file: Path, error: Exception) -> SqftError:
    return SqftError(f"cannot write {file.name}: {error}; nothing was changed")


def copy_settings(folder: Path, out: Path) -> None:
    """Copies what a Hugging Face folder holds besides weights: configuration, tokenizer, chat templates."""
    for file in folder.iterdir():
        if file.is_file() and file.suffix not in _LEFT_OUT and file.name not in _OWN and file.name[0] != ".":
            shutil.copyfile(file, out / file.name)
    if (folder / _TEMPLATES).is_dir():
        shutil.copytree(folder / _TEMPLATES, out / _TEMPLATES)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """One safetensors file; the same tensors give the same bytes (which more than one metadata entry would not). Raises
    SqftError if it cannot be written (a full disk, say)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise _cannot_write(file, error) from error
