"""The labels' loss of a causal language model without the logits of all its tokens: the head is applied to those that
have a label, chunk by chunk, and a chunk's gradient is taken at once (``distillation.lost``).

Logits are the largest tensor of a step: five copies of them in float32, for tokens of which half have no label.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sqft.errors import SqftError
from sqft.probe import evaluating
from sqft.training.data import IGNORED
from sqft.training.distillation import lost
from sqft.training.parts import Parts

TOLERANCE = 1e-3  # of a loss, relative, in half precision


def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(label) at each position, p = softmax(logits), [T] in float32 at least, and its gradient by the logits, p
    less 1 at the label: [T, V]."""
    log_p = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)).log_softmax(-1)
    loss_T = -log_p.gather(-1, labels_T[:, None])[:, 0]
    return loss_T, log_p.exp_().scatter_add_(-1, labels_T[:, None], torch.full_like(loss_T, -1.0)[:, None])


class LabelsLoss:
    """``with labels_loss:`` makes the model's own loss this one; it has to be called with ``ONE``, so that it makes no
    more logits than those of a token."""

    ONE: ClassVar = {"logits_to_keep": 1}

    def __init__(self, model: Any) -> None:
        """Raises SqftError for a model whose loss is another one, or whose head is trained."""
        self._parts, self._hidden = Parts(model), torch.empty(0)
        causal = self._parts.causal
        if self._parts.head_is_trained or "logits_to_keep" not in inspect.signature(causal.forward).parameters:
            raise SqftError("the model needs all its logits")
        device = causal.get_input_embeddings().weight.device
        inputs = {"input_ids": torch.arange(6, device=device)[None] % 4, "use_cache": False}
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][:, :2] = IGNORED
        with torch.no_grad(), evaluating(model):
            usual = model(**inputs).loss
            with self:
                mine = model(**inputs, **self.ONE).loss
        if not abs(float(mine - usual)) <= TOLERANCE * abs(float(usual)):
            raise SqftError("the model's loss is not the cross-entropy of its labels alone")

    def __enter__(self) -> None:
        causal = self._parts.causal
        self._usual = vars(causal).get("_loss_function")
        causal._loss_function = self._loss
        self._hook = self._parts.backbone.register_forward_hook(self._note)

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()
        self._hidden = torch.empty(0)
        del self._parts.causal._loss_function
        if self._usual is not None:
            self._parts.causal._loss_function = self._usual

    def _note(self, module: Any, arguments: Any, out: Any) -> None:
        self._hidden = out[0]

    def _loss(self, logits: Any = None, labels: Any = None, vocab_size: Any = None, num_items_in_batch: Any = None,
              **_: Any) -> Tensor:  # fmt: skip
        if self._hidden.shape[:2] != labels.shape:  # Gemma 4 cuts what it gives to its head earlier
            raise SqftError("the model's hidden states are not those of all tokens")
        labels_T = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        positions_T = (labels_T != IGNORED).nonzero().flatten()
        total = lost(self._hidden.flatten(0, 1), positions_T, self._parts.head,
                     lambda logits_TV, at: cross_entropy(logits_TV, labels_T[at]))  # fmt: skip
        return total / (len(positions_T) if num_items_in_batch is None else num_items_in_batch)


def labels_loss(model: Any) -> LabelsLoss | None:
    """The loss for a model, if it is one that this can be."""
    with contextlib.suppress(SqftError):
        return LabelsLoss(model)
    return None
