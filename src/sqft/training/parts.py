"""A causal language model's parts, bare or with adapters, and what passes through them in a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sqft.errors import SqftError, UsageError, did_you_mean
from sqft.probe import evaluating, tolerance
from sqft.registry import FAMILIES


@dataclass
class Seen:
    """Of one forward: each block's output [N, T, H] (S H, where it has S streams), what the head gets [N, T, H], the
    logits if they were made."""

    blocks: list[Tensor] = field(default_factory=list)
    hidden: Tensor | None = None
    logits: Tensor | None = None


class Parts:
    """Raises UsageError for a family that is not known, SqftError if its head is not what ``head`` computes."""

    def __init__(self, model: Any) -> None:
        causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        family = str(getattr(causal.config, "model_type", None))
        if family not in FAMILIES:
            raise UsageError(f"distillation: model family '{family}' is not known: {did_you_mean(family, FAMILIES)}")
        self.model, self.causal = model, causal
        path = FAMILIES[family].blocks
        self.blocks: list[Any] = list(causal.get_submodule(path))
        self.backbone: Any = causal.get_submodule(path.rpartition(".")[0])  # whose output goes to the head
        self._check_head()

    @property
    def width(self) -> int:
        return self.causal.config.get_text_config().hidden_size

    @property
    def head_is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.causal.get_output_embeddings().parameters())

    def head(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, V] of what the backbone gives."""
        config = self.causal.config.get_text_config()
        logits = self.causal.get_output_embeddings()(hidden_TH)
        logits = (
            logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        )
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    @torch.no_grad()
    def _check_head(self) -> None:
        token = torch.zeros(1, 1, dtype=torch.long, device=self.causal.get_input_embeddings().weight.device)
        with self.observed() as seen, evaluating(self.model):
            self.model(input_ids=token, use_cache=False)
        assert seen.hidden is not None and seen.logits is not None
        computed = self.head(seen.hidden)
        if not float((computed - seen.logits).abs().max()) <= tolerance(seen.logits, computed.dtype):
            raise SqftError(f"distillation: family '{self.causal.config.model_type}' makes its logits of its head's "
                            "output in a way that sqft does not know")  # fmt: skip

    @contextlib.contextmanager
    def observed(self, blocks: bool = False) -> Iterator[Seen]:
        """Notes what passes through in the forward inside; what checkpointing computes again later is not."""
        seen = Seen()

        def block(module: Any, arguments: Any, out: Any) -> None:
            states = out[0] if isinstance(out, tuple) else out
            if states.dim() == 4:  # of AltUp several streams [S, N, T, H]
                states = states.permute(1, 2, 0, 3).flatten(2)
            seen.blocks.append(states)

        def backbone(module: Any, arguments: Any, out: Any) -> None:
            seen.hidden = out[0]

        def model(module: Any, arguments: Any, out: Any) -> None:
            seen.logits = getattr(out, "logits", None)

        handles = [module.register_forward_hook(block) for module in self.blocks if blocks]
        handles += [self.backbone.register_forward_hook(backbone), self.model.register_forward_hook(model)]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
