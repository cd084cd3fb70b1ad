"""Linear layers that only answer, as fast as this machine can: a sparse weight in compact form, a dense INT4 one by
torch's own kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sqft.kernels.compact import Compact, CompactWeight, pack, starts
from sqft.kernels.cpu.library import stores_zeros
from sqft.kernels.dispatch import kernel
from sqft.kernels.packed import pack_mask
from sqft.kernels.rows import as_rows
from sqft.quantization.linear import QuantLinear


class Serving(nn.Module):
    """``y = x W^T + bias`` without a gradient."""

    bias: Tensor | None
    dtype = torch.float32  # that this layer computes in

    def __init__(self, outputs: int, inputs: int, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = outputs, inputs
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def weight(self) -> Tensor:
        """Empty, of the dtype and device that this layer computes in: some models look at that of their head."""
        return torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device)

    def product(self, x_TI: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y.add_(self.bias)

    def _apply(self, fn, recurse: bool = True) -> Serving:
        """``.to(dtype)``, ``.float()`` and the like leave everything as it is: weights are what they were stored as."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class CompactLinear(Serving):
    """A weight in compact form (``kernels/compact.py``). Equal to the layer that it was made from but for the order of
    sums, and of INT weights for the rounding of x to 16 bits (``kernels.cpu.library.compact_linear``)."""

    mask: Tensor
    values: Tensor
    starts: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, compact: Compact, scale_OG: Tensor | None, zero_OG: Tensor | None, group: int,
                 bias: Tensor | None) -> None:  # fmt: skip
        super().__init__(compact.mask_OB.shape[0], compact.inputs, bias)
        self.bits, self.group = compact.bits, group
        self.register_buffer("mask", compact.mask_OB.contiguous())
        self.register_buffer("values", compact.values)
        self.register_buffer("starts", starts(compact))
        self.register_buffer("scale", torch.zeros(0) if scale_OG is None else scale_OG.float().contiguous())
        self.register_buffer("zero", torch.zeros(0, dtype=torch.uint8) if zero_OG is None else zero_OG.contiguous())

    @classmethod
    def from_float(cls, w_OI: Tensor, packed_mask: Tensor | None, bias: Tensor | None) -> CompactLinear:
        """Of float16 or bfloat16 weights; without a mask all are stored."""
        if packed_mask is None:
            packed_mask = all_ones(*w_OI.shape, device=w_OI.device)
        return cls(pack(w_OI.detach(), packed_mask), None, None, 0, bias)

    @classmethod
    def from_rows(cls, w_OI: Tensor, bias: Tensor | None) -> CompactLinear | None:
        """Of a dense weight whose rows are integers times a scale (``kernels/rows.py``); None: it is not, or the kernel
        does not take its width."""
        if w_OI.shape[1] % 32 or (rows := as_rows(w_OI)) is None:
            return None
        packed = all_ones(*w_OI.shape, device=w_OI.device)
        values = (rows.q_VI.short() + 128).to(torch.uint8)
        zero = torch.full((len(w_OI), 1), 128, dtype=torch.uint8, device=w_OI.device)
        return cls(pack(values, packed, 8), rows.scale_V[:, None], zero, w_OI.shape[1], bias)

    @classmethod
    def from_packed(cls, layer: QuantLinear, packed_mask: Tensor | None) -> CompactLinear:
        """Of an INT weight whose groups are contiguous; without a mask what is zero is left out, and nothing where that
        is faster."""
        if layer.qweight.device.type == "cpu" and stores_zeros(layer.bits, layer.group_size):
            mask = all_ones(layer.out_features, layer.in_features)
        else:
            mask = pack_mask(layer.nonzero()) if packed_mask is None else packed_mask
        grid = layer.grid()
        return cls(pack(layer.integers(), mask, layer.bits), grid.scale_OG, grid.zero_OG, layer.group_size, layer.bias)

    @property
    def compact(self) -> CompactWeight:
        compact = Compact(self.mask, self.values, self.in_features, self.bits)
        return CompactWeight(compact, self.starts, self.scale, self.zero, self.group)

    def product(self, x_TI: Tensor) -> Tensor:
        return kernel("compact_linear", x_TI.device.type)(x_TI, self.compact)


def all_ones(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """A packed mask that keeps everything, one row for all."""
    return pack_mask(torch.ones(1, columns, dtype=torch.bool, device=device)).expand(rows, -1)


class Int4Linear(Serving):
    """A dense INT4 weight by torch's kernel for CPUs, which multiplies in bfloat16: inputs and scales are rounded to 8
    significant bits, so an output errs by about 0.3 %. Groups of 32, 64 or 128."""

    packed: Tensor
    scales: Tensor

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(layer.out_features, layer.in_features, layer.bias)
        self.group = layer.group_size
        integers = layer.integers().int()
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1))
        grid = layer.grid()
        scale_GO, zero_GO = grid.scale_OG.mT.float(), grid.zero_OG.mT.float()  # w = s (q - 8) + s (8 - z)
        self.register_buffer("scales", torch.stack([scale_GO, scale_GO * (8 - zero_GO)], -1).bfloat16().contiguous())

    @staticmethod
    def takes(layer: QuantLinear) -> bool:
        return layer.bits == 4 and layer.groups_are_contiguous and layer.group_size in (32, 64, 128) and not (
            layer.out_features % 16 or layer.in_features % 32)  # fmt: skip

    def product(self, x_TI: Tensor) -> Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(x_TI.bfloat16().contiguous(), self.packed, self.group, self.scales).to(x_TI.dtype)
