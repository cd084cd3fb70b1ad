"""A kind of adapter: masked, with twice the scaling."""

import torch.nn.functional as F

from sqft.adapters.kinds import Kind
from sqft.adapters.lora import factors
from sqft.adapters.sparse import MaskedLoraLinear
from sqft.kernels.packed import unpack_mask

DOUBLED = Kind("doubled", "masked, with twice the scaling", "sqft_example.doubled:Doubled", masked=True, merges=True)


class Doubled(MaskedLoraLinear):
    kind = DOUBLED

    def merged_weight(self, adapter, sign=1.0):
        a_RI, b_OR = factors(self, adapter)
        weight = self.get_base_layer().weight
        mask_OI = unpack_mask(self.mask, weight.shape[1], weight.dtype)
        return weight + sign * 2 * self.scaling[adapter] * mask_OI * (b_OR @ a_RI)

    def _adapted(self, x, adapter, dropout):
        return F.linear(x, self.merged_weight(adapter), self.get_base_layer().bias)
