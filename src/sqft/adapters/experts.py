"""PEFT and models whose experts are modules (``models/experts.py``).

PEFT takes an adapter of a model type with experts for one of transformers 4, and turns its targets, and its tensors
when it is loaded, into those of stacked parameters. Ours are what they say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from sqft.models.experts import Experts

CONVERSIONS = ("convert_peft_config_for_transformers", "convert_peft_adapter_state_dict_for_transformers")


def leave_experts_apart() -> None:
    """Lets PEFT leave adapters of such models as they are; those of all others it converts as before."""
    from peft.utils import transformers_weight_conversion as peft

    for name in CONVERSIONS:
        function = getattr(peft, name, None)
        if function is not None and not hasattr(function, "__wrapped__"):
            setattr(peft, name, _unless_apart(function))


def _unless_apart(convert: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(convert)
    def converted(*given: Any, **named: Any) -> Any:
        values = [*given, *named.values()]
        model = next(value for value in values if isinstance(value, nn.Module))
        if any(isinstance(module, Experts) for module in model.modules()):
            return named.get("adapter_state_dict", given[2] if len(given) > 2 else None)
        return convert(*given, **named)

    return converted
