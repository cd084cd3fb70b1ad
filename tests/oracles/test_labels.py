"""The labels' loss, which makes logits of tokens with a label alone, is the model's own: value and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import FAMILIES, pico_model

import sqft
from sqft.training.data import IGNORED
from sqft.training.labels import LabelsLoss, cross_entropy, labels_loss


def test_cross_entropy_by_autograd() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, 3, 3, 1])
    loss_T, gradient = cross_entropy(logits.detach(), labels)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss_T, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])


def batch() -> dict[str, torch.Tensor]:
    """Two rows: one is padded, both have tokens without a label."""
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 6:], labels[1, 6:], labels[0, :4], labels[1, :2] = 0, IGNORED, IGNORED, IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained(family: str) -> Any:
    torch.manual_seed(0)
    model = sqft.attach(pico_model(family).double(), sqft.SqftConfig(r=4, sparse_adapter=False))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


@pytest.mark.parametrize("items", [None, 30])
@pytest.mark.parametrize("family", [*FAMILIES, "granite", "cohere", "falcon", "mamba2"])
def test_it_is_the_models_own(family: str, items: int | None) -> None:
    model, found = trained(family), []
    known = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    mine = LabelsLoss(model)
    for ours in (False, True):
        model.zero_grad()
        torch.manual_seed(2)  # of dropout
        if ours:
            with mine:
                out = model(**batch(), **known, **mine.ONE)
            assert out.logits.shape[1] == 1
        else:
            out = model(**batch(), **known)
        out.loss.backward()
        found.append([out.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=2e-5, atol=1e-7)
    assert "_loss_function" not in vars(model.get_base_model())


def test_rows_without_a_label_lose_nothing() -> None:
    model = trained("llama")
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    with LabelsLoss(model) as _:
        loss = model(**inputs, num_items_in_batch=torch.tensor(3), **LabelsLoss.ONE).loss
    loss.backward()
    assert float(loss.detach()) == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_models_that_it_is_not_for_train_as_before() -> None:
    """A head that is trained, hidden states that are cut before the head, another loss."""
    model = pico_model("llama")
    assert labels_loss(model) is None  # its head is trained, tied to the embeddings
    assert labels_loss(trained("gemma4_text")) is None
    other = trained("llama")
    other.get_base_model().loss_function = lambda logits, labels, **_: logits.sum() * 0 + 7.0
    assert labels_loss(other) is None and labels_loss(trained("llama")) is not None
