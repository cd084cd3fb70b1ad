"""Blocks that a pass has finished, kept in a work folder beside the output until the stage is done: after an
interruption the same command runs them, to know what the next one sees, and changes only the rest."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sqft.errors import SqftError
from sqft.models.tensors import save_tensors
from sqft.outputs import broken, seal
from sqft.processes import alone, is_main_process

FILE = "block.safetensors"


class Kept:
    """``work``: the folder; None: nothing is kept. Of several processes the main one keeps, and all read."""

    def __init__(self, work: Path | None) -> None:
        self._work = work

    def has(self, name: str) -> bool:
        """Whether a block of that name is here, and whole."""
        return self._work is not None and bool(alone(lambda: not broken(self._folder(name))))

    def read(self, name: str) -> dict[str, Tensor]:
        """Raises SqftError for a file that cannot be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._folder(name) / FILE
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise SqftError(f"{file} cannot be read ({error}): remove its folder") from None

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Unless one of them is not in memory. Raises SqftError on a full disk."""
        if self._work is None or not is_main_process() or any(t.device.type == "meta" for t in tensors.values()):
            return
        folder = self._folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, folder / FILE)
        seal(folder)

    def _folder(self, name: str) -> Path:
        assert self._work is not None
        return self._work / name
