"""Norms that are trained beside adapters (``modules_to_save``), and merged exactly.

A norm is stored in the base's precision; steps of Adam are smaller than that of bfloat16 around 1. So a norm in half
precision is trained in float32, and computed with as it will be stored: rounded, the gradient passing straight through.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.func import functional_call

from sqft.models.discover import norms


class _Rounded:
    """The forward of a trained norm, with its weights rounded to the dtypes of the original one's."""

    def __init__(self, trained: nn.Module, original: nn.Module) -> None:
        self.trained, self.original = trained, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        dtypes = {name: parameter.dtype for name, parameter in self.original.named_parameters()}
        rounded = {name: p.to(dtypes[name]) for name, p in self.trained.named_parameters()}
        return functional_call(self.original, rounded, args, kwargs)


def train_rounded(model: nn.Module) -> None:
    """Holds the norms in half precision that a ``PeftModel`` trains whole in float32. What they compute stays."""
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or "" not in norms(wrapper.original_module):
            continue
        for trained in wrapper.modules_to_save.values():
            if any(p.dtype in (torch.float16, torch.bfloat16) for p in trained.parameters()):
                trained.float()
                trained.forward = _Rounded(trained, wrapper.original_module)
