"""What a student loses against its teacher, against naive float64 and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sqft.training.distillation import (
    block_error,
    divergence,
    divergence_of_most_probable,
    lost,
    most_probable,
)

POSITIONS, VOCABULARY, HIDDEN = 7, 50, 12


def logits(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def naive_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """t^2 sum p log(p / q), in float64, token by token."""
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (teacher, student))
    return temperature**2 * (p * (p / q).log()).sum(-1)


def naive_binned(student: Tensor, teacher: Tensor, index: Tensor, temperature: float) -> Tensor:
    """The same of K + 1 bins."""
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (teacher, student))
    bins = [torch.cat([x.gather(-1, index), 1 - x.gather(-1, index).sum(-1, keepdim=True)], -1) for x in (p, q)]
    return temperature**2 * (bins[0] * (bins[0] / bins[1]).log()).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_and_its_gradient(temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    expected = naive_kl(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    found, found_gradient = divergence(student.detach(), teacher, temperature)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-4, atol=1e-6)
    assert (found > 0).all() and divergence(teacher, teacher)[0].abs().max() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 8, 49])
def test_kl_of_the_most_probable_and_the_rest(k: int, temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    values, index = most_probable(teacher, k, temperature)
    assert (values.dtype, index.dtype) == (torch.float16, torch.int32)
    exact = torch.log_softmax(teacher.double() / temperature, -1).gather(-1, index.long())
    assert (exact.float() - values).abs().max() < 0.01 and (values[:, :-1] >= values[:, 1:]).all()
    expected = naive_binned(student, teacher, index.long(), temperature)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    found, found_gradient = divergence_of_most_probable(student.detach(), exact, index, temperature)
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_gradient.float(), gradient, rtol=1e-3, atol=1e-5)
    assert (found <= naive_kl(student, teacher, temperature) + 1e-5).all()


def test_rounded_log_probabilities_that_add_up_to_more_than_one() -> None:
    """The loss stays one of distributions: it is >= 0, 0 only where they are equal, and moves no mass out of the sum."""
    teacher = torch.tensor([[20.0, 19.9, 0.0, 0.0]])
    _, index = most_probable(teacher, 2)
    too_much = torch.log_softmax(teacher, -1)[:, :2] + 0.01
    loss, gradient = divergence_of_most_probable(teacher, too_much, index)
    assert abs(float(loss)) < 1e-6 and gradient.abs().max() < 1e-6
    loss, gradient = divergence_of_most_probable(teacher.flip(-1), too_much, index)
    assert float(loss) > 1 and float(gradient.sum()) == pytest.approx(0, abs=1e-6)


def test_all_tokens_are_the_whole_vocabulary() -> None:
    student, teacher = logits(0), logits(1)
    _, index = most_probable(teacher, VOCABULARY)
    exact = torch.log_softmax(teacher, -1).gather(-1, index.long())
    for mine, whole in zip(
        divergence_of_most_probable(student, exact, index), divergence(student, teacher), strict=True
    ):
        torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)


def test_block_error() -> None:
    student, teacher = logits(0), 1000 * logits(1)
    teacher[0] = 0
    expected = [float(sum((s - t) ** 2 for s, t in zip(one, two, strict=True)) / (sum(t * t for t in two) + 1e-6))
                for one, two in zip(student.double().tolist(), teacher.double().tolist(), strict=True)]  # fmt: skip
    torch.testing.assert_close(block_error(student, teacher), torch.tensor(expected), rtol=1e-5, atol=0)
    assert block_error(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("with_head", [False, True])
def test_a_sum_in_chunks_is_the_sum(with_head: bool, chunk: int | None) -> None:
    """Loss and gradient equal those of autograd over the logits of all positions at once."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    rows = torch.randn(POSITIONS, HIDDEN, generator=generator) if with_head else logits(0)
    rows.requires_grad_()
    teacher, positions = logits(1), torch.tensor([5, 0, 2, 3])

    def head(x: Tensor) -> Tensor:
        return 4 * torch.tanh((x @ weight.to(x.dtype).mT) / 4)

    expected = naive_kl(head(rows.double()) if with_head else rows, teacher, 2.0)[positions].sum()
    (gradient,) = torch.autograd.grad(expected * 0.5, rows)
    found = lost(rows, positions, head if with_head else None, lambda x, at: divergence(x, teacher[at], 2.0), chunk)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    (found_gradient,) = torch.autograd.grad(found * 0.5, rows)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-4, atol=1e-5)
    assert not found_gradient[1].any() and found_gradient[2].any()


def test_no_position_counts() -> None:
    rows = logits(0).requires_grad_()
    found = lost(rows, torch.empty(0, dtype=torch.long), None, lambda x, at: divergence(x, x))
    found.backward()
    assert found.item() == 0 and rows.grad is not None and not rows.grad.any()
