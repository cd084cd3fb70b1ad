"""SparsePEFT: a LoRA layer whose product B A is masked by the base's sparsity (SQFT, arXiv 2410.03750, section 3.3;
``kernels/reference.py``). A pruned weight stays zero, and what is trained is what is merged."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from sqft.adapters.kinds import SPARSE_PEFT
from sqft.adapters.lora import check_adapter, factors, scale_of
from sqft.errors import SqftError
from sqft.kernels.ops import linear, masked_weight
from sqft.kernels.reference import Adapter
from sqft.models.weights import Weight, is_transposed
from sqft.sparsity.masks import packed_mask


def give_mask(module: Any, sparse: bool, name: str = "") -> None:
    """Gives a base layer without a mask one by which every weight may change, as in a dense INT model; raises SqftError
    if it should be ``sparse``: a masked adapter on it would be a dense one."""
    if packed_mask(module) is not None:
        return
    if sparse:
        raise SqftError(f"{name or 'a target'} is not sparse, or sqft has not seen it: it has no mask; use sqft.load "
                        "and sqft.attach, leave it out, or use plain LoRA (sparse_adapter=False)")  # fmt: skip
    device = next(iter(module.state_dict().values())).device
    weight = Weight(name, module)
    weight.set_mask(torch.ones(weight.shape, dtype=torch.bool, device=device))


def check_finite(adapter: str, safe: bool, *tensors: Tensor) -> None:
    """PEFT's ``safe_merge``: raises ValueError for an adapter that has diverged."""
    if safe and not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")


class MaskedLoraLinear(LoraLinear):
    """What masked adapters share: one adapter on a base layer with a mask. A kind of its own gives ``_adapted`` and
    ``merged_weight``, computed with ``mask``, ``factors(self, adapter)`` and ``scale_of(self, adapter)``."""

    kind = SPARSE_PEFT

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
        check_adapter(self, config)
        give_mask(self.get_base_layer(), config.sparse_adapter, self.kwargs.get("target_name", ""))

    @property
    def mask(self) -> Tensor:
        """uint8 [O, ceil(I / 8)], packed."""
        packed = packed_mask(self.get_base_layer())
        assert packed is not None
        return packed

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise SqftError("masked adapters cannot be mixed within a batch")
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x)
        if len(active) > 1:
            raise SqftError(f"one masked adapter at a time: {', '.join(active)} are active; call set_adapter")
        return self._adapted(x, active[0], getattr(self.lora_dropout[active[0]], "p", 0.0))

    def _adapted(self, x: Tensor, adapter: str, dropout: float) -> Tensor:
        """The layer's output with one active adapter; ``dropout`` acts on the adapter's input only."""
        raise NotImplementedError

    def merged_weight(self, adapter: str, sign: float = 1.0) -> Tensor:
        """The weight [O, I] that ``_adapted`` multiplies with in evaluation, bit for bit, in the base's dtype; with
        ``sign`` -1 the base's weight less the adapter."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._put_in(name, safe_merge)
                self.merged_adapters.append(name)

    def _put_in(self, adapter: str, safe: bool) -> None:
        merged = self.merged_weight(adapter)
        check_finite(adapter, safe, merged)
        self.get_base_layer().weight.data = self.as_stored(merged)

    def _take_out(self, adapter: str) -> None:
        """Subtracts the adapter: zeros stay zero, other weights return to within rounding."""
        self.get_base_layer().weight.data = self.as_stored(self.merged_weight(adapter, sign=-1.0))

    def as_stored(self, w_OI: Tensor) -> Tensor:
        """A float base's weight in the shape of its parameter, which ``Conv1D`` has as [I, O]."""
        return w_OI.mT.contiguous() if is_transposed(self.get_base_layer()) else w_OI

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._take_out(self.merged_adapters.pop())

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.", "sqft.", 1)


class SparseLoraLinear(MaskedLoraLinear):
    """SparsePEFT on a ``torch.nn.Linear``, or a ``Conv1D``.

    In evaluation, and in training without dropout, it multiplies with the merged weight, bit for bit, in any precision.
    With dropout (training) the adapter has a product of its own, ``x W^T + drop(x) (s M o (B A))^T``: the sum of two
    rounded products, in half precision near the merged weight's but not equal to it.
    """

    @property
    def _base_OI(self) -> Tensor:
        base: Any = self.get_base_layer()
        return base.weight.mT if is_transposed(base) else base.weight

    def _adapter(self, name: str, sign: float = 1.0) -> Adapter:
        return Adapter(*factors(self, name), self.mask, sign * scale_of(self, name), self._base_OI)

    def _adapted(self, x: Tensor, adapter: str, dropout: float) -> Tensor:
        bias = cast(Any, self.get_base_layer()).bias
        return linear(x, bias, None, self._adapter(adapter), dropout, self.training)

    def merged_weight(self, adapter: str, sign: float = 1.0) -> Tensor:
        return masked_weight(self._adapter(adapter, sign), self._base_OI.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The masked adapter alone, [O, I]."""
        alone = self._adapter(adapter)._replace(base=None)
        return masked_weight(alone, alone.a_RI.dtype)
