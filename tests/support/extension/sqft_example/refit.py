"""A sparsifier that updates weights: magnitude, and each row scaled so that it answers a constant input as before."""

import torch

from sqft.sparsity.method import Pruned, sparsifier


@sparsifier(paper="none: an example")
def refit(w_OI, pattern):
    mask_OI = pattern.kept(w_OI.abs())
    kept_OI = torch.where(mask_OI, w_OI, 0)
    factor_O = w_OI.abs().sum(1) / kept_OI.abs().sum(1).clamp(min=1e-12)
    return Pruned(mask_OI, kept_OI * factor_O[:, None])
