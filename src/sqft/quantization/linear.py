"""``QuantLinear``: a linear layer that holds its weight packed, with scales and integer zero points."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sqft.kernels.ops import dequantized, linear
from sqft.kernels.packed import Packed, pack_words, unpack_words, word_count
from sqft.quantization.grid import Grid
from sqft.quantization.method import Quantized


class QuantLinear(nn.Module):
    """``y = x W^T + bias`` with W on a grid of 2, 3, 4 or 8 bits.

    The state dict is the GPTQ layout with zero points as they are ("v2"): ``qweight`` int32 [I * bits / 32, O],
    ``qzeros`` int32 [G, O * bits / 32], ``scales`` float16 [G, O], ``g_idx`` int32 [I], and ``bias`` [O]. The forward
    de-quantizes the weight to x's dtype, for this product only; the scales are never cast to another dtype. Beside it
    may lie ``fractions``, int8 [I, O], not in the state dict: what rounding took away, in 256ths of a step, which
    quantization-aware adapters start from. Whoever changes the integers drops them.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    fractions: Tensor | None

    def __init__(self, in_features: int, out_features: int, bits: int, group_size: int, bias: bool = False,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        """``group_size``: columns a group, -1 for a whole row; ``dtype`` of the bias."""
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.stored_group_size = group_size  # as checkpoints state it
        self.group_size = in_features if group_size == -1 else group_size
        self.symmetric = False  # whether all zero points are in the middle, which some formats do not store
        groups = -(-in_features // self.group_size)
        shapes = {
            "qweight": ((word_count(in_features, bits), out_features), torch.int32),
            "qzeros": ((groups, word_count(out_features, bits)), torch.int32),
            "scales": ((groups, out_features), torch.float16),
        }
        for name, (shape, kind) in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))
        self.register_buffer("g_idx", torch.arange(in_features, dtype=torch.int32, device=device) // self.group_size)
        self.register_buffer("fractions", None, persistent=False)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)
        self._contiguous: bool | None = None

    @classmethod
    def from_quantized(cls, quantized: Quantized, group_size: int, symmetric: bool,
                       bias: Tensor | None = None) -> QuantLinear:  # fmt: skip
        """The layer of integers [O, I] and their grid, with their fractions if they have some."""
        q_OI, grid, fractions_OI = quantized
        rows, columns = q_OI.shape
        layer = cls(columns, rows, grid.bits, group_size, device=q_OI.device)
        layer.symmetric = symmetric
        layer.qweight = pack_words(q_OI.mT, grid.bits)
        layer.qzeros = pack_words(grid.zero_OG, grid.bits).mT.contiguous()
        layer.scales = grid.scale_OG.mT.contiguous()
        if fractions_OI is not None:
            layer.fractions = fractions_OI.mT.contiguous()
        if grid.group_I is not None:
            layer.g_idx = grid.group_I.to(torch.int32)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    def filled(self, buffers: Mapping[str, Tensor], bias: Tensor | None) -> QuantLinear:
        """A layer like this one, with these buffers, and its mask if it is among them."""
        layer = copy.deepcopy(self)
        for name, tensor in buffers.items():
            layer.register_buffer(name, tensor, persistent=name in self._buffers and name != "fractions")
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    @property
    def groups_are_contiguous(self) -> bool:
        """Whether column i is of group i // group_size, as it is unless another tool wrote act-order without static
        groups."""
        if self.g_idx.device.type == "meta":
            return True
        if self._contiguous is None:
            plain = torch.arange(self.in_features, dtype=torch.int32, device=self.g_idx.device) // self.group_size
            self._contiguous = bool(torch.equal(self.g_idx, plain))
        return self._contiguous

    def packed(self) -> Packed:
        """The weight as the kernels take it."""
        g_idx = None if self.groups_are_contiguous else self.g_idx
        return Packed(self.qweight, self.qzeros, self.scales, g_idx, self.bits)

    def grid(self) -> Grid:
        """The weight's grid."""
        packed = self.packed()
        group_I = None if packed.g_idx is None else packed.g_idx.long()
        return Grid(self.bits, self.scales.mT, packed.zeros_GO().mT.to(torch.uint8), group_I)

    def integers(self) -> Tensor:
        """uint8 [O, I]."""
        return unpack_words(self.qweight, self.in_features, self.bits).to(torch.uint8).mT.contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I], de-quantized."""
        return dequantized(self.packed(), self.in_features, dtype)

    @property
    def weight(self) -> Tensor:
        """For models that look at a layer's weight, as state-space ones do: on an accelerator their kernels multiply by
        it, on a CPU they only see where it lies."""
        return torch.empty(0, device="cpu") if self.qweight.device.type == "cpu" else self.dequantize()

    def nonzero(self) -> Tensor:
        """bool [O, I]: where the weight is not zero, by its integers."""
        grid = self.grid()
        groups_I = self.g_idx.long()
        return (self.integers() != grid.zero_OG[:, groups_I]) & (grid.scale_OG != 0)[:, groups_I]

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.bias, self.packed())

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._contiguous = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse: bool = True) -> QuantLinear:
        """``.to(dtype)``, ``.half()`` and the like leave the scales as they are: the grid must not move."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        if self.qweight.device.type not in ("cpu", "meta"):  # a copy anyway; kernels want it without strides
            self.qweight = self.qweight.contiguous()
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}"
        )
