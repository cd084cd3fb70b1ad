"""Fractions: what rounding took away of each weight of an INT model, in 256ths of a step (``QuantLinear.fractions``), a
file of their own. In a folder they are ``fractions/fractions.safetensors``, int8 [I, O] by module name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sqft.errors import SqftError
from sqft.formats.checkpoint import packed_layers
from sqft.keys import FRACTIONS
from sqft.models.tensors import save_tensors


def stored_fractions(model: nn.Module) -> dict[str, Tensor]:
    """All fractions of a live model as a folder holds them, by module name."""
    layers = packed_layers(model)
    return {name: layer.fractions.cpu() for name, layer in layers.items() if layer.fractions is not None}


def save_fractions(fractions: dict[str, Tensor], folder: Path) -> None:
    """Writes what ``stored_fractions`` gives."""
    (folder / FRACTIONS).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(fractions, folder / FRACTIONS)


def load_fractions(folder: str | Path) -> dict[str, Tensor]:
    """What ``save_fractions`` wrote; empty if the folder has none. Raises SqftError for a corrupt file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(folder) / FRACTIONS
    if not file.is_file():
        return {}
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise SqftError(f"{file} is corrupt or truncated ({error}): run the quantize stage again") from None


def attach_fractions(model: nn.Module, fractions: Mapping[str, Tensor]) -> None:
    """Puts fractions on the packed layers that they belong to, where these lie. Raises SqftError if names, shapes or
    dtypes do not fit."""
    layers = packed_layers(model)
    for name, fraction_IO in fractions.items():
        layer = layers.get(name)
        shape = layer and (layer.in_features, layer.out_features)
        if layer is None or fraction_IO.shape != shape or fraction_IO.dtype != torch.int8:
            raise SqftError(f"the fractions of '{name}' do not fit the model's layer: fractions of another model?")
        layer.fractions = fraction_IO.to(layer.qweight.device)
