"""The adapted linear layer ``y = x W'^T + bias`` as one custom operator, and the weight W' by itself.

W' is ``W + s * M o (B A)`` (SparsePEFT), that on W's grid (QA-SparsePEFT), or what packed integers mean; ``reference``
has the mathematics, and ``dispatch`` picks the implementation. Forward, backward and merging build it by the same
function, so they are equal bit for bit.

The masked adapter costs one large product in forward and two in backward (dX, and dY^T X which has to be masked before
it can be contracted with A and B). Between forward and backward only x, the base, A, B, the mask and the dropout's seed
are kept; W' is built again, at R / T of the cost of a product. Both directions are custom operators: were they traced,
``torch.compile`` would see the same weight in both and keep it.

Shape letters: T tokens, O output features, I input features, R rank, G groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sqft.kernels.dispatch import is_slow_half, kernel, like_linear, product, row_chunks
from sqft.kernels.packed import Packed, pack_words
from sqft.kernels.reference import Adapter, grid_scales


def _run(op: str, device: torch.device, *arguments: Any) -> Any:
    """The operator's implementation for a device, without autograd and autocast, which would round what is exact."""
    with torch.no_grad(), _no_autocast(device):
        return kernel(op, device.type)(*arguments)


def _autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False) if _autocast(device) else contextlib.nullcontext()


def masked_weight(adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """``reference.masked_weight`` on the adapter's device: what training multiplies with, and merging writes."""
    return _run("masked_weight", adapter.b_OR.device, adapter, dtype)


def dequantized(packed: Packed, inputs: int, dtype: torch.dtype) -> Tensor:
    """``reference.dequantized`` on the weight's device: [O, I] in ``dtype``."""
    return _run("dequantized", packed.qweight.device, packed, inputs, dtype)


def quant_aware_weight(packed: Packed, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """``reference.quant_aware_weight`` on the weight's device: [O, I] in ``dtype``."""
    return _run("quant_aware_weight", packed.qweight.device, packed, adapter, dtype)


@torch.no_grad()
def merge_packed(packed: Packed, adapter: Adapter) -> Packed:
    """The adapted weight on the base's grid (or the learnt one), packed. Its integers mean ``quant_aware_weight`` bit
    for bit: what was an integer times the scale is divided by the scale, and rounds back to the integer."""
    w_IO = quant_aware_weight(packed, adapter, torch.float32).mT
    scales_GO = grid_scales(packed, adapter)
    scales, zeros = packed.by_column(scales_GO.float()), packed.by_column(packed.zeros_GO())
    qweight = torch.empty_like(packed.qweight)
    for chunk in row_chunks(w_IO.shape[1], len(w_IO), w_IO.device):
        w = w_IO[:, chunk].view(len(zeros), -1, chunk.stop - chunk.start)
        q = w.div(scales[..., chunk]).round_().add_(zeros[..., chunk])
        qweight[:, chunk] = pack_words(q.reshape(len(w_IO), -1), packed.bits)
    return packed._replace(qweight=qweight, scales=scales_GO)


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Inverted dropout whose mask is a function of ``seed`` (int64 scalar on the CPU) alone. 16 random bits an element,
    so p is met to 1 / 65536; four share a 64-bit draw: several times cheaper than ``F.dropout`` on a CPU."""
    generator = torch.Generator(device=x.device).manual_seed(int(seed))
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None, generator=generator)
    threshold = round(p * 65536)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - 32768
    return x.mul(keep).mul_(65536 / (65536 - threshold))


def _drop_features(a_RI: Tensor, p: float, seed: Tensor) -> Tensor:
    """A with some input features dropped, for all tokens of this step alike; the others grow by 1 / (1 - p)."""
    return a_RI if p == 0 else a_RI * drop(torch.ones_like(a_RI[:1]), p, seed)


def _grid(words: Sequence[Tensor], bits: int) -> Packed | None:
    """The packed weight of the operators' arguments: none, or qweight, qzeros, scales and perhaps g_idx."""
    if not words:
        return None
    qweight, qzeros, scales, *g_idx = words
    return Packed(qweight, qzeros, scales, g_idx[0] if g_idx else None, bits)


def _adapter(a: Tensor | None, b: Tensor | None, mask: Tensor | None, scale: float, *rest: Any) -> Adapter | None:
    """The adapter of the operators' arguments, which are None without one; ``rest`` as the fields of ``Adapter``."""
    if a is None or b is None or mask is None:
        return None
    return Adapter(a, b, mask, scale, *rest)


def _weight(packed: Packed | None, adapter: Adapter | None, inputs: int, dtype: torch.dtype) -> Tensor:
    """W' [O, I] in ``dtype``."""
    if packed is None:
        assert adapter is not None
        stored = dtype if adapter.base is None else adapter.base.dtype
        return masked_weight(adapter, stored).to(dtype)
    if adapter is None:
        return dequantized(packed, inputs, dtype)
    return quant_aware_weight(packed, adapter, dtype)


@torch.library.custom_op("sqft::linear", mutates_args=())
def linear_op(x: Tensor, bias: Tensor | None, words: Sequence[Tensor], bits: int, a: Tensor | None, b: Tensor | None,
              mask: Tensor | None, scale: float, base: Tensor | None, new_scales: Tensor | None,
              fractions: Tensor | None, in_steps: bool, p: float, seed: Tensor,
              training: bool) -> Tensor:  # fmt: skip
    """See ``linear``; ``words`` as of ``_grid``, from ``a`` to ``in_steps`` the fields of an ``Adapter``. The result is
    no view, so that it may be changed in place."""
    x_TI = x.reshape(-1, x.shape[-1])
    # Evaluation multiplies as nn.Linear does (``halves`` too): un-merged and merged logits are equal, not merely close.
    multiply = product if training or (bits and is_slow_half(x.dtype)) else like_linear
    grid, adapted = _grid(words, bits), _adapter(a, b, mask, scale, base, new_scales, fractions, in_steps)
    with _no_autocast(x.device):
        if p and grid is None:
            assert base is not None and adapted is not None
            y_TO = multiply(x_TI, base.to(x.dtype), bias)
            y_TO += multiply(drop(x_TI, p, seed), masked_weight(adapted._replace(base=None), x.dtype))
        else:
            if adapted is not None:
                adapted = adapted._replace(a_RI=_drop_features(adapted.a_RI, p, seed))
            w_OI = _weight(grid, adapted, x.shape[-1], x.dtype)
            if not training and grid is not None:
                w_OI = w_OI.mT.contiguous().mT  # as QuantLinear's lies: with an un-quantized base it does not
            y_TO = multiply(x_TI, w_OI, bias)
    return torch.ops.aten._unsafe_view(y_TO, [*x.shape[:-1], y_TO.shape[1]])


@linear_op.register_fake
def _(x, bias, words, bits, a, b, mask, scale, base, new_scales, fractions, in_steps, p, seed, training):
    outputs = words[2].shape[1] if words else base.shape[0]
    return x.new_empty(*x.shape[:-1], outputs)


@torch.library.custom_op("sqft::linear_backward", mutates_args=())
def linear_backward_op(dy: Tensor, x: Tensor, words: Sequence[Tensor], bits: int, a: Tensor | None, b: Tensor | None,
                       mask: Tensor | None, scale: float, base: Tensor | None, new_scales: Tensor | None,
                       fractions: Tensor | None, in_steps: bool, p: float, seed: Tensor,
                       need_x: bool) -> list[Tensor]:  # fmt: skip
    """The gradients of x, if need be, and of A, B and the learnt scales, of those that there are, in this order.
    Without an adapter x may be empty."""
    x_TI, dy_TO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    grid, adapted = _grid(words, bits), _adapter(a, b, mask, scale, base, new_scales, fractions, in_steps)
    with _no_autocast(x.device):
        if adapted is None:
            dx_TI, gradients = product(dy_TO, _weight(grid, None, x.shape[-1], dy.dtype).mT) if need_x else None, []
        elif grid is None:
            dx_TI, *gradients = _sparse_backward(dy_TO, x_TI, adapted, p, seed, need_x)
        else:
            dx_TI, *gradients = _quant_aware_backward(dy_TO, x_TI, grid, adapted, p, seed, need_x)
    if dx_TI is None:
        return gradients
    return [torch.ops.aten._unsafe_view(dx_TI, [*dy.shape[:-1], x.shape[-1]]), *gradients]


def _sparse_backward(dy_TO: Tensor, x_TI: Tensor, adapter: Adapter, p: float, seed: Tensor, need_x: bool) -> Any:
    dx_TI = None
    if need_x and p == 0:
        dx_TI = product(dy_TO, _weight(None, adapter, x_TI.shape[1], x_TI.dtype).mT)
    elif need_x:
        assert adapter.base is not None
        dx_TI = drop(product(dy_TO, masked_weight(adapter._replace(base=None), x_TI.dtype).mT), p, seed)
        dx_TI += product(dy_TO, adapter.base.to(x_TI.dtype).mT)
    x_TI = x_TI if p == 0 else drop(x_TI, p, seed)
    return dx_TI, *_run("masked_gradients", x_TI.device, dy_TO, x_TI, adapter)


def _quant_aware_backward(dy_TO: Tensor, x_TI: Tensor, packed: Packed, adapter: Adapter, p: float, seed: Tensor,
                          need_x: bool) -> Any:  # fmt: skip
    a_RI, b_OR = adapter.a_RI, adapter.b_OR
    adapter = adapter._replace(a_RI=_drop_features(a_RI, p, seed))
    da, db, ds, w_OI = _run("quant_aware_gradients", x_TI.device, dy_TO, x_TI, packed, adapter)
    dx_TI = product(dy_TO, w_OI.mT) if need_x else None
    return dx_TI, _drop_features(da, p, seed).to(a_RI.dtype), db.to(b_OR.dtype), *([] if ds is None else [ds])


@linear_backward_op.register_fake
def _(dy, x, words, bits, a, b, mask, scale, base, new_scales, fractions, in_steps, p, seed, need_x):
    dx = [dy.new_empty(*dy.shape[:-1], x.shape[-1])] if need_x else []
    return dx + [torch.empty_like(tensor) for tensor in (a, b, new_scales) if tensor is not None]


def _setup_context(ctx, inputs, output) -> None:
    x, _, words, ctx.bits, a, b, mask, ctx.scale, base, new_scales, fractions, ctx.in_steps, ctx.p, seed, _ = inputs
    kept = x if a is not None else x.new_empty(0, x.shape[-1])
    ctx.save_for_backward(kept, seed, a, b, mask, base, new_scales, fractions, *words)


def _backward(ctx, dy):
    x, seed, a, b, mask, base, new_scales, fractions, *words = ctx.saved_tensors
    need_x, need_bias, *_ = ctx.needs_input_grad
    gradients = []
    if a is not None or need_x:
        gradients = torch.ops.sqft.linear_backward(
            dy.contiguous(), x, words, ctx.bits, a, b, mask, ctx.scale, base, new_scales, fractions, ctx.in_steps,
            ctx.p, seed, need_x,
        )  # fmt: skip
    dx = gradients.pop(0) if need_x else None
    dbias = dy.flatten(0, -2).sum(0) if need_bias else None
    da, db, *ds = gradients or (None, None)
    dscales = ds[0] if ds else None
    return dx, dbias, [None] * len(words), None, da, db, None, None, None, dscales, *[None] * 5


linear_op.register_autograd(_backward, setup_context=_setup_context)


def linear(x: Tensor, bias: Tensor | None, packed: Packed | None = None, adapter: Adapter | None = None,
           dropout: float = 0.0, training: bool = False) -> Tensor:  # fmt: skip
    """``y = x W'^T + bias``: SparsePEFT's layer, QA-SparsePEFT's with ``packed`` too, or a packed weight's alone.

    Differentiable in x, bias, A, B and the learnt scales. The result is no view: it may be changed in place.

    Args:
        x: [..., I] of any float dtype, which the product is computed in. Under autocast it is cast to autocast's dtype,
            as ``F.linear`` would; W' is built without autocast.
        bias: [O] or None.
        packed: the weight on its grid.
        adapter: A [R, I] and B [O, R], usually float32, mask, scale and what else adapts the weight. ``adapter.base``
            [O, I], frozen, zero where the mask is 0, is needed without ``packed``: the sum is then computed in float32
            at least and rounded to its dtype, so that what is trained is, bit for bit, what merging writes.
        dropout: probability of dropping input elements **of the adapter**; the base path is never dropped. Without
            ``packed`` each token draws its own, which needs a second product, ``x W^T + s * drop(x) (M o (B A))^T``;
            with it, columns of A are scaled by one draw for all tokens of the step, so that the weight is one and the
            product stays one. With B = 0 the output is the base's, exactly.
        training: use the fastest product; otherwise multiply as ``nn.Linear`` does, and drop nothing.
    """
    if _autocast(x.device):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    p = float(dropout) if training else 0.0
    # The seed comes from the CPU generator: no synchronisation with a GPU, and checkpointing restores it.
    seed = torch.randint(2**62, (), dtype=torch.int64) if p else torch.zeros((), dtype=torch.int64)
    words = [] if packed is None else [tensor for tensor in packed[:4] if tensor is not None]
    nothing: Any = None
    fields = Adapter(nothing, nothing, nothing, 1.0) if adapter is None else adapter
    fields = fields._replace(scale=float(fields.scale))
    bias = bias if bias is None else bias.to(x.dtype)
    bits = 0 if packed is None else packed.bits
    return torch.ops.sqft.linear(x, bias, words, bits, *fields, p, seed, training)
