"""Products with packed INT weights, and QA-SparsePEFT's: ``y = x Q(W + s * M o (B A))^T + bias`` (arXiv 2410.03750).

Shape letters: T tokens, O output features, I input features, R rank, G groups, P = ceil(I / 8) packed mask bytes. The
packed layout runs along the input, so weights are [I, O] here, built a chunk of outputs at a time. With an un-quantized
base, which is [O, I], they are views of [O, I] memory: nothing large is transposed.

In units of the grid's scale, with q the base's integers and z its zero points, the weight that is multiplied with is

    t = (q - z) + s / scale * M o (B A)          w = scale * clamp(round(t), -z, 2^bits - 1 - z)

Rounding is straight-through. The clamp passes gradients inside its range and none outside: there the rounded weight
does not move with t.

Between forward and backward only x, A, B and the packed base and mask are kept; t and w are built again in backward,
in chunks that stay in the cache, in the same loop that masks the weight's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sqft.kernels.dispatch import product
from sqft.kernels.packing import pack, unpack
from sqft.kernels.torch_ops import drop, row_chunks, unpack_mask


class Packed(NamedTuple):
    """A weight [O, I] on its grid, in the GPTQ layout ("v2": zero points as they are).

    ``qweight`` int32 [I * bits / 32, O], ``qzeros`` int32 [G, O * bits / 32], ``scales`` [G, O], ``g_idx`` int32 [I],
    the group of each column, or None where groups are contiguous.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    bits: int

    @property
    def largest(self) -> int:
        return 2**self.bits - 1

    def zeros_GO(self) -> Tensor:
        """int32 [G, O]."""
        return unpack(self.qzeros.mT, self.scales.shape[1], self.bits).mT.contiguous()

    def by_column(self, value_GO: Tensor) -> Tensor:
        """Per-group values as [G, 1, O], or [I, 1, O] with ``g_idx``: they fit a weight viewed as [that, -1, O]."""
        return (value_GO if self.g_idx is None else value_GO.index_select(0, self.g_idx))[:, None]


def integers(packed: Packed, inputs: int) -> Tensor:
    """uint8 [O, I]: the integers of a packed weight."""
    return unpack(packed.qweight, inputs, packed.bits).to(torch.uint8).mT.contiguous()


@torch.no_grad()
def dequantized(packed: Packed, inputs: int, dtype: torch.dtype) -> Tensor:
    """[I, O] in ``dtype``: what the packed integers mean, computed in float32."""
    outputs = packed.scales.shape[1]
    out_IO = torch.empty(inputs, outputs, dtype=dtype, device=packed.scales.device)
    zeros = packed.by_column(packed.zeros_GO())
    scales = packed.by_column(packed.scales.float())
    for chunk in row_chunks(outputs, inputs, out_IO.device):
        q = unpack(packed.qweight[:, chunk], inputs, packed.bits).view(len(zeros), -1, chunk.stop - chunk.start)
        w = q.sub_(zeros[..., chunk]).to(torch.float32).mul_(scales[..., chunk])
        out_IO[:, chunk] = w.view(inputs, -1)
    return out_IO


class Adapter(NamedTuple):
    """What QA-SparsePEFT adds to a packed base. ``base``: the un-quantized sparse weight [O, I] instead of the packed
    one's meaning, or None. ``new_scales``: float32 [G, O] that are learnt instead of the base's, or None."""

    a_RI: Tensor
    b_OR: Tensor
    mask_OP: Tensor
    scale: float
    base: Tensor | None = None
    new_scales: Tensor | None = None


class Piece(NamedTuple):
    """A chunk of outputs: ``t`` [n, I / n, chunk] before rounding, ``mask`` [I, chunk], limits and scales to match."""

    chunk: slice
    t: Tensor
    mask: Tensor
    low: Tensor
    high: Tensor
    scales: Tensor


def _pieces(packed: Packed, adapter: Adapter) -> Iterator[Piece]:
    """The adapted weight in units of its scale, a chunk of outputs after the other."""
    a_IR, b_RO = adapter.a_RI.float().mT, adapter.b_OR.float().mT * adapter.scale
    inputs, outputs = a_IR.shape[0], b_RO.shape[1]
    scales_GO = grid_scales(packed, adapter)
    zeros = packed.by_column(packed.zeros_GO())
    scales = packed.by_column(scales_GO)
    inverse = packed.by_column(1 / scales_GO)
    ratio = None if adapter.new_scales is None else packed.by_column(packed.scales.float() / scales_GO)
    low = (-zeros).float()
    for chunk in row_chunks(outputs, inputs, b_RO.device):
        shape = (len(zeros), -1, chunk.stop - chunk.start)
        if adapter.base is None:
            mask = _mask_IO(adapter.mask_OP[chunk], inputs)
            t = torch.mm(a_IR, b_RO[:, chunk]).mul_(mask).view(shape).mul_(inverse[..., chunk])
            u = unpack(packed.qweight[:, chunk], inputs, packed.bits).view(shape).sub_(zeros[..., chunk])
            t += u if ratio is None else u * ratio[..., chunk]
        else:
            mask = unpack_mask(adapter.mask_OP[chunk], inputs, torch.float32).mT
            t = torch.addmm(adapter.base[chunk].float(), b_RO[:, chunk].mT, a_IR.mT).mT.mul_(mask)
            t = t.view(shape).mul_(inverse[..., chunk])
        below = low[..., chunk]
        yield Piece(chunk, t, mask, below, below + packed.largest, scales[..., chunk])


def grid_scales(packed: Packed, adapter: Adapter) -> Tensor:
    """float32 [G, O]: the scales in force; learnt ones as float16 will store them."""
    return (packed.scales if adapter.new_scales is None else adapter.new_scales.half()).float()


def _mask_IO(mask_OP: Tensor, inputs: int) -> Tensor:
    """float32 [I, O] of 0 and 1 from packed bits."""
    bits_PO = mask_OP.mT.contiguous()
    out = torch.empty(bits_PO.shape[0], 8, bits_PO.shape[1], dtype=torch.uint8, device=mask_OP.device)
    for k in range(8):
        torch.bitwise_right_shift(bits_PO, k, out=out[:, k])
    return out.bitwise_and_(1).view(-1, bits_PO.shape[1])[:inputs].float()


def _empty_IO(adapter: Adapter, dtype: torch.dtype) -> Tensor:
    outputs, inputs = adapter.b_OR.shape[0], adapter.a_RI.shape[1]
    if adapter.base is None:
        return adapter.b_OR.new_empty(inputs, outputs, dtype=dtype)
    return adapter.b_OR.new_empty(outputs, inputs, dtype=dtype).mT


def _adapted(packed: Packed, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    out_IO = _empty_IO(adapter, dtype)
    for chunk, t, _, low, high, scales in _pieces(packed, adapter):
        w = torch.clamp(t.round_(), low, high, out=t).mul_(scales)
        out_IO[:, chunk] = w.view(len(out_IO), -1)
    return out_IO


@torch.no_grad()
def quant_aware_weight(packed: Packed, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """[I, O], contiguous: the weight that training multiplies with, and merging stores."""
    return _adapted(packed, adapter, dtype).contiguous()


@torch.no_grad()
def merged(packed: Packed, adapter: Adapter) -> Packed:
    """The adapted weight on the base's grid (or the learnt one), packed: its integers mean ``quant_aware_weight``."""
    qweight = torch.empty_like(packed.qweight)
    inputs = adapter.a_RI.shape[1]
    for chunk, t, _, low, high, _ in _pieces(packed, adapter):
        q = torch.clamp(t.round_(), low, high, out=t).sub_(low)
        qweight[:, chunk] = pack(q.view(inputs, -1), packed.bits)
    scales = packed.scales if adapter.new_scales is None else adapter.new_scales.half()
    return packed._replace(qweight=qweight, scales=scales)


def _gradients(dy_TO: Tensor, x_TI: Tensor, packed: Packed, adapter: Adapter,
               dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of A, B and the learnt scales, and the weight [I, O] for the gradient of x: one loop over chunks.

    With G = x^T dY, and C 1 where t is inside the clamp's range: dA = s B^T (M o C o G)^T, dB = s (M o C o G)^T A^T,
    and for a learnt scale the sum over its group of G o (clamp(round(t)) - C o t) (LSQ, arXiv 1902.08153, eq. 3).
    """
    a_RI, b_OR = adapter.a_RI.float(), adapter.b_OR.float()
    w_IO = _empty_IO(adapter, dtype)
    da_IR, db_OR = torch.zeros_like(a_RI.mT), torch.empty_like(b_OR)
    ds_GO = None if adapter.new_scales is None else torch.zeros_like(adapter.new_scales)
    for chunk, t, mask, low, high, scales in _pieces(packed, adapter):
        g_IO = product(dy_TO[:, chunk].mT, x_TI.mT).mT.float()
        if adapter.base is None:
            g_IO = g_IO.contiguous()
        nearest = t.round_() if ds_GO is None else t.round()
        rounded = torch.clamp(nearest, low, high)
        inside = nearest.eq_(rounded)  # 1.0 or 0.0, in place: several times faster than masked_fill
        if ds_GO is not None:
            by_column = g_IO.view(t.shape) * (rounded - t.mul_(inside))
            _add_by_group(ds_GO[:, chunk], by_column, packed.g_idx)
        g_IO.mul_(mask).view(t.shape).mul_(inside)
        da_IR.addmm_(g_IO, b_OR[chunk])
        torch.mm(g_IO.mT, a_RI.mT, out=db_OR[chunk])
        w_IO[:, chunk] = rounded.mul_(scales).view(len(w_IO), -1)
    return da_IR.mT.mul(adapter.scale), db_OR.mul_(adapter.scale), ds_GO, w_IO


def _add_by_group(target_GO: Tensor, value: Tensor, g_idx: Tensor | None) -> None:
    if g_idx is None:
        target_GO += value.sum(1)
    else:
        target_GO.index_add_(0, g_idx, value[:, 0])


@torch.library.custom_op("sqft::quant_linear", mutates_args=())
def quant_linear_op(x: Tensor, bias: Tensor | None, qweight: Tensor, qzeros: Tensor, scales: Tensor,
                    g_idx: Tensor | None, bits: int) -> Tensor:  # fmt: skip
    x_TI = x.reshape(-1, x.shape[-1])
    w_IO = dequantized(Packed(qweight, qzeros, scales, g_idx, bits), x.shape[-1], x.dtype)
    return F.linear(x_TI, w_IO.mT, bias).view(*x.shape[:-1], scales.shape[1])


@quant_linear_op.register_fake
def _(x, bias, qweight, qzeros, scales, g_idx, bits):
    return x.new_empty(*x.shape[:-1], scales.shape[1])


def _quant_setup(ctx, inputs, output) -> None:
    x, _, qweight, qzeros, scales, g_idx, ctx.bits = inputs
    ctx.save_for_backward(qweight, qzeros, scales, g_idx)
    ctx.inputs = x.shape[-1]


def _quant_backward(ctx, dy):
    qweight, qzeros, scales, g_idx = ctx.saved_tensors
    packed = Packed(qweight, qzeros, scales, g_idx, ctx.bits)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.sqft.quant_linear_backward(dy.contiguous(), *packed, ctx.inputs)
    dbias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
    return dx, dbias, None, None, None, None, None


@torch.library.custom_op("sqft::quant_linear_backward", mutates_args=())
def quant_linear_backward_op(dy: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None,
                             bits: int, inputs: int) -> Tensor:  # fmt: skip
    w_IO = dequantized(Packed(qweight, qzeros, scales, g_idx, bits), inputs, dy.dtype)
    return product(dy.reshape(-1, dy.shape[-1]), w_IO).view(*dy.shape[:-1], inputs)


@quant_linear_backward_op.register_fake
def _(dy, qweight, qzeros, scales, g_idx, bits, inputs):
    return dy.new_empty(*dy.shape[:-1], inputs)


quant_linear_op.register_autograd(_quant_backward, setup_context=_quant_setup)


def quant_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` of a packed weight, differentiable in x and bias; W is de-quantized for the product and dropped.

    ``x`` [..., I] of any float dtype, which the product is computed in; under autocast it is cast as by ``F.linear``.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return quant_linear(x.to(dtype), packed, bias if bias is None else bias.to(dtype))
    return torch.ops.sqft.quant_linear(x, bias if bias is None else bias.to(x.dtype), *packed)


def _unflatten(tensors: tuple[Tensor | None, ...], bits: int, scale: float) -> tuple[Packed, Adapter]:
    qweight, qzeros, scales, g_idx, a, b, mask, base, new_scales = tensors
    assert qweight is not None and qzeros is not None and scales is not None
    assert a is not None and b is not None and mask is not None
    return Packed(qweight, qzeros, scales, g_idx, bits), Adapter(a, b, mask, scale, base, new_scales)


def _drop_features(a_RI: Tensor, p: float, seed: Tensor) -> Tensor:
    """A with some input features dropped, for all tokens of this step alike; the others grow by 1 / (1 - p)."""
    return a_RI if p == 0 else a_RI * drop(torch.ones_like(a_RI[:1]), p, seed)


@torch.library.custom_op("sqft::quant_aware_linear", mutates_args=())
def quant_aware_linear_op(x: Tensor, bias: Tensor | None, qweight: Tensor, qzeros: Tensor, scales: Tensor,
                          g_idx: Tensor | None, a: Tensor, b: Tensor, mask: Tensor, base: Tensor | None,
                          new_scales: Tensor | None, bits: int, scale: float, p: float, seed: Tensor,
                          training: bool) -> Tensor:  # fmt: skip
    a = _drop_features(a, p, seed)
    packed, adapter = _unflatten((qweight, qzeros, scales, g_idx, a, b, mask, base, new_scales), bits, scale)
    # Evaluation multiplies as QuantLinear does: un-merged and merged logits are then equal, not merely close.
    w_IO = (_adapted if training else quant_aware_weight)(packed, adapter, x.dtype)
    y_TO = (product if training else F.linear)(x.reshape(-1, x.shape[-1]), w_IO.mT, bias)
    return y_TO.view(*x.shape[:-1], b.shape[0])


@quant_aware_linear_op.register_fake
def _(x, bias, qweight, qzeros, scales, g_idx, a, b, mask, base, new_scales, bits, scale, p, seed, training):
    return x.new_empty(*x.shape[:-1], b.shape[0])


@torch.library.custom_op("sqft::quant_aware_linear_backward", mutates_args=())
def quant_aware_backward_op(dy: Tensor, x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor,
                            g_idx: Tensor | None, a: Tensor, b: Tensor, mask: Tensor, base: Tensor | None,
                            new_scales: Tensor | None, bits: int, scale: float, p: float, seed: Tensor,
                            need_x: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dropped = _drop_features(a, p, seed)
    packed, adapter = _unflatten((qweight, qzeros, scales, g_idx, dropped, b, mask, base, new_scales), bits, scale)
    x_TI, dy_TO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    da, db, ds, w_IO = _gradients(dy_TO, x_TI, packed, adapter, x.dtype)
    da = _drop_features(da, p, seed)
    dx = product(dy_TO, w_IO).view(x.shape) if need_x else x.new_empty(0)
    return dx, da.to(a.dtype), db.to(b.dtype), x.new_empty(0) if ds is None else ds


@quant_aware_backward_op.register_fake
def _(dy, x, qweight, qzeros, scales, g_idx, a, b, mask, base, new_scales, bits, scale, p, seed, need_x):
    ds = x.new_empty(0) if new_scales is None else torch.empty_like(new_scales)
    return (torch.empty_like(x) if need_x else x.new_empty(0)), torch.empty_like(a), torch.empty_like(b), ds


def _aware_setup(ctx, inputs, output) -> None:
    x, _, *tensors, ctx.bits, ctx.scale, ctx.p, seed, _ = inputs
    ctx.save_for_backward(x, *tensors, seed)


def _aware_backward(ctx, dy):
    x, *tensors, seed = ctx.saved_tensors
    need_x, need_bias, *_ = ctx.needs_input_grad
    dx, da, db, ds = torch.ops.sqft.quant_aware_linear_backward(
        dy.contiguous(), x, *tensors, ctx.bits, ctx.scale, ctx.p, seed, need_x
    )
    dbias = dy.flatten(0, -2).sum(0) if need_bias else None
    dscales = None if tensors[-1] is None else ds
    return dx if need_x else None, dbias, *[None] * 4, da, db, None, None, dscales, *[None] * 5


quant_aware_linear_op.register_autograd(_aware_backward, setup_context=_aware_setup)


def quant_aware_linear(x: Tensor, packed: Packed, bias: Tensor | None, adapter: Adapter, dropout: float = 0.0,
                       training: bool = True) -> Tensor:  # fmt: skip
    """QA-SparsePEFT's linear layer, ``y = x Q(W + s * M o (B A))^T + bias``, in one large product.

    Differentiable in x, bias, A, B and the learnt scales.

    Args:
        x: [..., I] of any float dtype, which the product is computed in. Under autocast it is cast.
        packed: the base on its grid.
        adapter: A, B, mask and scale, and what else adapts the base.
        dropout: probability of dropping an input feature **of the adapter**, by scaling columns of A. One draw holds
            for all tokens of the step, so that the weight is one and the product stays one; LoRA draws for each token.
            With B = 0 the output is the base's, exactly.
        training: use the fastest product; otherwise multiply as ``QuantLinear`` does, and drop nothing.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            bias = bias if bias is None else bias.to(dtype)
            return quant_aware_linear(x.to(dtype), packed, bias, adapter, dropout, training)
    p = float(dropout) if training else 0.0
    # The seed comes from the CPU generator: no synchronisation with a GPU, and checkpointing restores it.
    seed = torch.randint(2**62, (), dtype=torch.int64) if p else torch.zeros((), dtype=torch.int64)
    a, b, mask, scale, base, new_scales = adapter
    return torch.ops.sqft.quant_aware_linear(
        x, bias if bias is None else bias.to(x.dtype), *packed[:4], a, b, mask, base, new_scales, packed.bits,
        float(scale), p, seed, training,
    )  # fmt: skip
