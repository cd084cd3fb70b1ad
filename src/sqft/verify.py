"""Verification of a trained or merged model: zeros, masks, every trained tensor, logits. What fails is not written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sqft import probe
from sqft.errors import VerificationError
from sqft.formats.checkpoint import packed_layers
from sqft.models.discover import describe
from sqft.models.reader import digest, same_bits
from sqft.sparsity.masks import ZeroCounts, collect_masks

_BUG = "nothing was written; this is a bug in sqft, please report it"


def verify(merged: nn.Module, before: Tensor, tokens: Tensor, tolerance: float, masks: Mapping[str, Tensor],
           masked: bool, expected: Iterable[tuple[str, Tensor | str]]) -> dict[str, Any]:  # fmt: skip
    """Checks zeros and the base's ``masks`` (packed, by weight name; if the merge is not ``masked``, zeros are counted
    only), each trained tensor, which has to be the ``expected`` one of its name in the state dict (or have that
    ``digest``), bit for bit, and the logits on ``tokens``, which were ``before``. Returns the metrics. Raises
    VerificationError.
    """
    counts = ZeroCounts()
    for weight in describe(merged).weights():
        counts.add(weight, masks.get(weight.name))
    metrics = counts.metrics()
    if masked:
        if counts.filled:
            raise VerificationError(f"{counts.filled} of {counts.pruned} pruned weights are not zero after "
                                    f"merging: {_BUG}")  # fmt: skip
        found = collect_masks(merged)
        if found.keys() != masks.keys() or not all(torch.equal(found[name].cpu(), masks[name].cpu()) for name in masks):
            raise VerificationError(f"the masks of the merged model are not the base's: {_BUG}")
    packed = packed_layers(merged)
    metrics["parameters"] = sum(p.numel() for p in merged.parameters()) + sum(
        layer.in_features * layer.out_features for layer in packed.values()
    )
    state, compared = merged.state_dict(), set()
    parameters = dict(merged.named_parameters())  # an expert has a tensor of its own here, in the state a slice
    for name, wanted in expected:
        found = state.get(name, parameters.get(name, torch.empty(0)))
        if not (digest(found) == wanted if isinstance(wanted, str) else same_bits(found, wanted)):
            raise VerificationError(f"{name} of the merged model is not what was trained: {_BUG}")
        compared.add(name)
    adapted = [packed[name] for name in packed if f"{name}.qweight" in compared]
    if adapted:
        metrics["bits"] = adapted[0].bits
        metrics["integers_compared"] = sum(layer.in_features * layer.out_features for layer in adapted)
    metrics["tensors_compared"] = len(compared)
    metrics["max_logit_difference"] = check_logits(before, probe.logits(merged, tokens), tolerance, masked)
    metrics["tokens_compared"] = tokens.numel()
    return metrics


def check_logits(before: Tensor, after: Tensor, exact: float, masked: bool) -> float:
    """Largest difference of logits; raises VerificationError above the tolerance, ``exact`` of a masked adapter.

    A masked adapter multiplies with the very weight that is merged. Plain LoRA adds a second product, in another
    order of summation, so its tolerance follows the logits' size and precision.
    """
    difference = float((before.float() - after.float()).abs().max())
    allowed = exact if masked else max(exact, probe.tolerance(before, before.dtype))
    if not difference <= allowed:  # also catches NaN
        raise VerificationError(f"merged and un-merged logits differ by {difference:.3g}, allowed are {allowed:.3g}: "
                                "nothing was written")  # fmt: skip
    return difference
