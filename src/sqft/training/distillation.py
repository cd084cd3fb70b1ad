"""What a student loses against its teacher: mathematics on tensors (docs/distillation.md).

KL of the predicted tokens (Hinton et al., arXiv 1503.02531), of all tokens or of the teacher's most probable ones and
the rest in one bin; relative error of the blocks' outputs (SquareHead: Kurtic et al., arXiv 2310.06927). Vocabularies
are large: a sum over positions goes chunk by chunk, and keeps no logits but the student's gradient.

Shape letters: N rows, D what a row has (hidden features, or logits), T positions, V vocabulary, K tokens, H features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22  # logits that are worked on at a time: 16 MiB in float32
EPSILON = 1e-6
TINY = torch.finfo(torch.float32).tiny

Head = Callable[[Tensor], Tensor]  # hidden states [T, H] -> logits [T, V]
# (the student's logits [T, V], int64 [T]: their rows) -> what is lost at each [T], its gradient by the logits [T, V]
Target = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def divergence(student_TV: Tensor, teacher_TV: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """t^2 KL(p_teacher || p_student), p = softmax(logits / t), at each position, and its gradient by the student's
    logits, t (p_student - p_teacher).

    Args:
        student_TV, teacher_TV: logits of any float type; computed in float32 at least.

    Returns [T] and [T, V].
    """
    log_s, log_t = (_log_probabilities(logits, temperature) for logits in (student_TV, teacher_TV))
    p_t = log_t.exp()
    return temperature**2 * (p_t * (log_t - log_s)).sum(-1), temperature * (log_s.exp() - p_t)


def most_probable(logits_TV: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """float16 log-probabilities [T, K] in softmax(logits / t), int32 indices [T, K] of the k most probable tokens."""
    values, indices = _log_probabilities(logits_TV, temperature).topk(min(k, logits_TV.shape[-1]))
    return values.half(), indices.int()


def divergence_of_most_probable(student_TV: Tensor, log_p_TK: Tensor, index_TK: Tensor,
                                temperature: float = 1.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``divergence`` where of the teacher K tokens are known (``most_probable``): both distributions have K + 1 bins,
    the last of which holds all other tokens. It is never more than the whole one (Cover and Thomas, 2.7)."""
    index_TK = index_TK.long()
    log_s = _log_probabilities(student_TV, temperature)
    p_s, log_t = log_s.exp(), log_p_TK.to(log_s.dtype)
    log_t = log_t - log_t.logsumexp(-1, keepdim=True).clamp(min=0)  # rounded, they may add up to more than 1
    p_t = log_t.exp()
    rest_t = (1 - p_t.sum(-1)).clamp(min=0)
    rest_s = p_s.scatter(-1, index_TK, 0.0).sum(-1).clamp(min=TINY)
    known = (p_t * (log_t - log_s.gather(-1, index_TK))).sum(-1)
    rest = torch.xlogy(rest_t, rest_t) - rest_t * rest_s.log()
    wanted = (p_s * (rest_t / rest_s)[:, None]).scatter(-1, index_TK, p_t)
    return temperature**2 * (known + rest), temperature * (p_s - wanted)


def _log_probabilities(logits_TV: Tensor, temperature: float) -> Tensor:
    logits = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def block_error(student_TH: Tensor, teacher_TH: Tensor, epsilon: float = EPSILON) -> Tensor:
    """||h_s - h_t||^2 / (||h_t||^2 + epsilon) at each position: [T], in float32 at least. Relative by token: first
    tokens, which attention rests on, are larger than others by orders of magnitude."""
    dtype = torch.promote_types(student_TH.dtype, torch.float32)
    student, teacher = student_TH.to(dtype), teacher_TH.to(dtype)
    return (student - teacher).square().sum(-1) / (teacher.square().sum(-1) + epsilon)


def lost(rows_ND: Tensor, positions_T: Tensor, head: Head | None, target: Target, chunk: int | None = None) -> Tensor:
    """The sum over positions of what ``target`` says is lost, a scalar in float32 at least; differentiable by
    ``rows_ND`` alone.

    Args:
        rows_ND: the student's logits, or the hidden states that ``head`` makes logits of.
        positions_T: int64, the rows that count, each once.
        head: None: rows are logits. Its parameters get no gradient.
        chunk: positions that are worked on at a time; default: about 4 million logits.

    No logits are kept but ``rows_ND`` themselves: every chunk's gradient is computed with its loss.
    """
    return _Lost.apply(rows_ND, positions_T, head, target, chunk)


class _Lost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, positions_T: Tensor, head: Head | None, target: Target,
                chunk: int | None) -> Tensor:  # fmt: skip
        total = torch.zeros((), dtype=torch.promote_types(rows_ND.dtype, torch.float32), device=rows_ND.device)
        gradient_ND = torch.zeros_like(rows_ND)
        width = rows_ND.shape[-1] if head is None else _width(head, rows_ND[:1])
        for at in positions_T.split(chunk or max(1, CHUNK_ELEMENTS // width)):
            x = rows_ND[at]
            if head is None:
                lost_T, gradient = target(x, at)
            else:
                with torch.enable_grad():
                    logits = head(x.requires_grad_())
                lost_T, of_logits = target(logits.detach(), at)
                (gradient,) = torch.autograd.grad(logits, x, of_logits.to(logits.dtype))
            gradient_ND[at] = gradient.to(gradient_ND.dtype)
            total += lost_T.sum()
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *of_total: Tensor) -> Any:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * of_total[0].to(gradient_ND.dtype), None, None, None, None


def _width(head: Head, row_1H: Tensor) -> int:
    with torch.no_grad():
        return head(row_1H).shape[-1]
