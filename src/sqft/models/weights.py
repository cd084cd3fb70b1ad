"""``Weight``: one linear weight of a model, wherever it lies and however it is laid out.

That is the weight of a ``torch.nn.Linear``, of a transposed ``transformers`` ``Conv1D``, a packed layer's, or one slice
of a 3-D parameter (an expert). Where accelerate keeps it elsewhere (offloaded, the module's own is on ``meta``), it is
read from and written to that place.

Shape letters: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from sqft.errors import SqftError
from sqft.kernels.packed import pack_mask, unpack_mask

MASK = "sqft_mask"  # non-persistent buffer of the module: follows .to(device), is not in the state dict


def is_packed(module: Any) -> bool:
    """Whether a layer holds integers: it has ``qweight``, ``in_features``, ``out_features``, ``dequantize()`` and
    ``nonzero()``."""
    return hasattr(module, "qweight")


def is_transposed(module: Any) -> bool:
    """Whether a layer is ``transformers``' ``Conv1D``, which holds its weight as [I, O]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear layer: dense, transposed or packed."""
    return isinstance(module, nn.Linear) or is_packed(module) or is_transposed(module)


def is_plain(module: nn.Module) -> bool:
    """Whether a float layer gives ``x W^T + bias`` and does no more: ``nn.Linear``, Falcon's, which adds the bias by
    itself, or a ``Conv1D``. Other subclasses may do anything."""
    return type(module) is nn.Linear or type(module).__name__ == "FalconLinear" or is_transposed(module)


def block_index(name: str) -> int | None:
    """Which block a module is in: 'model.layers.3.mlp.up_proj' -> 3; None for one outside of blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one of this name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


class Weight:
    """One linear weight by its full ``name``; ``module`` is the layer whose input it is multiplied with.

    Args:
        parent: the module that has ``module`` as a child, for ``replace``.
        parameter, index, transposed: of one slice of a 3-D parameter [E, O, I] (``transposed``: [E, I, O]).
    """

    def __init__(self, name: str, module: nn.Module, parent: nn.Module | None = None, *, parameter: str = "weight",
                 index: int | None = None, transposed: bool = False) -> None:  # fmt: skip
        self.name, self.module = name, module
        self._parent, self._parameter, self._index, self._transposed = parent, parameter, index, transposed

    @property
    def packed(self) -> bool:
        """Whether it is stored as integers."""
        return self._index is None and is_packed(self.module)

    @property
    def transposed(self) -> bool:
        """Whether the parameter holds it as [I, O]."""
        return self._transposed or is_transposed(self.module)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        module: Any = self.module
        if self.packed:
            return module.out_features, module.in_features
        rows, columns = getattr(module, self._parameter).shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def dtype(self) -> torch.dtype:
        """Of what ``read`` gives."""
        return torch.float32 if self.packed else getattr(self.module, self._parameter).dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return stored(self.module, "qweight" if self.packed else self._parameter).device

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias [O], without gradient."""
        has = self._index is None and getattr(self.module, "bias", None) is not None
        return stored(self.module, "bias").detach() if has else None

    def read(self) -> Tensor:
        """The weight [O, I], without gradient; de-quantized to float32 where it is packed."""
        module: Any = self.module
        if self.packed:
            return module.dequantize()
        return self.part(stored(module, self._parameter).detach())

    @property
    def parameter(self) -> Tensor:
        """The parameter of the module that holds it, transposed or with others as may be."""
        return getattr(self.module, self._parameter)

    def part(self, whole: Tensor) -> Tensor:
        """Its [O, I] in a tensor that is shaped as ``parameter`` is (its gradient, say)."""
        part = whole if self._index is None else whole[self._index]
        return part.mT if self.transposed else part

    def nonzero(self) -> Tensor:
        """bool [O, I]: where it is not zero; of a packed weight, its integers say so."""
        return cast(Any, self.module).nonzero() if self.packed else self.read() != 0

    def write(self, w_OI: Tensor) -> None:
        """Puts ``w_OI`` in the place of the old tensor, which stays as it is (it may be a mapped file), with the old
        one's dtype, device and ``requires_grad``. Raises SqftError for a packed weight or another shape."""
        if self.packed:
            raise SqftError(f"{self.name} is packed: its values cannot be written, replace its module")
        if tuple(w_OI.shape) != self.shape:
            raise SqftError(f"{self.name} is {list(self.shape)}, what is to be written is {list(w_OI.shape)}")
        old = stored(self.module, self._parameter)
        new = (w_OI.mT if self.transposed else w_OI).detach().to(old.device, old.dtype)
        if self._index is not None:
            mine = getattr(old, "_sqft_copied", False)  # one copy for all slices of a parameter
            whole = old.detach() if mine else old.detach().clone()
            whole[self._index] = new
            new = whole
        store(self.module, self._parameter, new.contiguous(), sliced=self._index is not None)

    def replace(self, module: nn.Module) -> None:
        """Puts another module in this one's place, in the model, and in the block that has this weight."""
        if self._index is not None:
            raise SqftError(f"{self.name} is a slice of {self._parameter}: it has no module of its own to replace")
        hook = _offload(self.module)
        if hook is not None:
            module.to(hook.execution_device)
        if self._parent is not None:
            put_module(self._parent, self.name.rpartition(".")[2], module)
        self.module = module

    @property
    def packed_mask(self) -> Tensor | None:
        """uint8 [O, ceil(I / 8)], or None if it has no mask."""
        mask = getattr(self.module, self._mask_name, None)
        if mask is None or self._index is None:
            return mask
        return mask[self._index] if getattr(self.module, self._mask_name + "_of")[self._index] else None

    @property
    def mask(self) -> Tensor | None:
        """bool [O, I], True: may be non-zero; None if it has no mask."""
        packed = self.packed_mask
        return None if packed is None else unpack_mask(packed, self.shape[1])

    def set_mask(self, mask_OI: Tensor) -> None:
        """Remembers bool [O, I] on the module, one bit a weight, where the weight lies."""
        self.set_packed_mask(pack_mask(mask_OI))

    def set_packed_mask(self, packed: Tensor) -> None:
        """The same of uint8 [O, ceil(I / 8)]."""
        packed = packed.to(self.device)
        if self._index is not None:
            masks, has = getattr(self.module, self._mask_name, None), self._mask_name + "_of"
            if masks is None:
                slices = getattr(self.module, self._parameter).shape[0]
                masks = packed.new_full((slices, *packed.shape), 255)
                self.module.register_buffer(has, torch.zeros(slices, dtype=torch.bool), persistent=False)
            masks[self._index] = packed
            getattr(self.module, has)[self._index] = True
            packed = masks
        self.module.register_buffer(self._mask_name, packed, persistent=False)

    @property
    def _mask_name(self) -> str:
        return MASK if self._index is None else f"{MASK}_{self._parameter}"


def linear_weights(model: nn.Module) -> Iterator[Weight]:
    """Every linear layer inside of blocks, of a model of any family, with or without adapters (which are left out)."""
    for name, module in model.named_modules():
        if is_linear(module) and block_index(name) is not None and ".lora_" not in name:
            yield Weight(name, module)


def stored(module: Any, name: str) -> Tensor:
    """A tensor of a module, from where accelerate keeps it if it is offloaded."""
    tensor, hook = getattr(module, name), _offload(module)
    return hook.weights_map[name] if hook is not None and tensor.device.type == "meta" else tensor


def stored_state(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """A module's state dict, offloaded tensors from where they are kept, one after the other."""
    for name, tensor in module.state_dict(prefix=prefix).items():
        path, _, leaf = name.removeprefix(prefix).rpartition(".")
        yield name, stored(module.get_submodule(path), leaf).detach() if tensor.device.type == "meta" else tensor


def store(module: Any, name: str, tensor: Tensor, sliced: bool = False) -> None:
    """Puts a tensor in the place of a module's parameter, or where accelerate keeps it; the old one stays as it is."""
    old, hook = getattr(module, name), _offload(module)
    if hook is not None and old.device.type == "meta":
        place = hook.weights_map  # a mapping, with a prefix, onto a dict or a loader that looks into its dict first
        key = f"{getattr(place, 'prefix', '')}{name}"
        place = getattr(place, "dataset", place)
        getattr(place, "state_dict", place)[key] = tensor
    else:
        setattr(module, name, nn.Parameter(tensor, requires_grad=old.requires_grad))
        tensor = getattr(module, name)
    if sliced:
        tensor._sqft_copied = True  # pyright: ignore[reportAttributeAccessIssue]


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor that may be divided among several (a DTensor)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: Any) -> Any:
    """All of a tensor that may be divided; all processes have to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def first_row(tensor: Any) -> int:
    """Which row of a tensor that may be divided by its rows is the first that this process holds."""
    if not hasattr(tensor, "device_mesh"):
        return 0
    mesh = tensor.device_mesh
    return min(len(tensor), -(-len(tensor) // mesh.size()) * mesh.get_local_rank())


def _offload(module: Any) -> Any:
    """accelerate's hook that brings a module's tensors for its forward only, or None."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return next((hook for hook in hooks if getattr(hook, "weights_map", None) is not None), None)
