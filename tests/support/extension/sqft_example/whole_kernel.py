"""A kernel: SparsePEFT's effective weight on a CPU, in one piece instead of chunk after chunk."""

from sqft.kernels.packed import unpack_mask

CALLS = []


def masked_weight(adapter, dtype):
    CALLS.append(dtype)
    w_OI = adapter.scale * (adapter.b_OR.float() @ adapter.a_RI.float())
    if adapter.base is not None:
        w_OI = w_OI + adapter.base.float()
    return (w_OI * unpack_mask(adapter.mask_OP, adapter.a_RI.shape[1], w_OI.dtype)).to(dtype)
