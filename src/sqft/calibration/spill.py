"""Activations in files instead of memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from sqft.errors import SqftError, UsageError


class Spilled(list[Tensor]):
    """A list whose tensors lie on the CPU as pages of files in ``folder``, one each, which the system writes and reads
    as it needs memory. The files have no names: they are gone with their tensors, even of a process that is killed."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        if not Path(folder).is_dir():
            raise UsageError(f"there is no folder {folder} to spill activations to: make it, or name another")
        self._folder = folder

    def append(self, tensor: Tensor) -> None:
        super().append(self._stored(tensor))

    def __setitem__(self, index, tensor) -> None:
        super().__setitem__(index, self._stored(tensor))

    def __copy__(self) -> Spilled:
        """Of the same tensors."""
        same = Spilled(self._folder)
        same.extend(self)
        return same

    def _stored(self, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder) as file:
                file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                file.flush()
                mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except (OSError, RuntimeError) as error:
            size = tensor.nbytes / 1e6
            raise SqftError(f"cannot spill {size:.0f} MB of activations to {self._folder} ({error})") from None
        return mapped.view(tensor.shape)
