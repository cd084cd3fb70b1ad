"""``Distill``: a mixin by which any Trainer learns from a teacher, and elastic adapters' small ranks from the largest
(docs/distillation.md; the mathematics is in ``distillation.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sqft.elastic.scheduler import RankScheduler
from sqft.errors import UsageError
from sqft.training.distillation import Target, block_error, divergence, lost
from sqft.training.parts import Parts, Seen
from sqft.training.teachers import CachedTeacher, Teacher, check_teacher, predicting, real

if TYPE_CHECKING:
    from transformers import Trainer

    Below = Trainer
else:
    Below = object

TERMS = ("labels_loss", "logits_loss", "blocks_loss", "ranks_loss")  # as they are logged


class Distill(Below):
    """``class MyTrainer(sqft.Distill, Trainer)``, or ``SFTTrainer``: their loss is the first term of

        distill_loss L + distill_logits t^2 KL(p_teacher || p) + distill_blocks mean_l ||h_l - g_l||^2 / ||g_l||^2

    (h, g: the outputs of the student's and the teacher's blocks), each a mean over the tokens of the whole step,
    however it is accumulated. Evaluation has L alone. The terms' means are logged beside the loss as labels_loss,
    logits_loss, blocks_loss, ranks_loss.

    Args:
        teacher: a causal language model, which is frozen here and put on the Trainer's device, or a ``CachedTeacher``.
        distill_loss, distill_logits, distill_blocks: weights; without blocks, models of other sizes may teach.
        distill_temperature: t.
        distill_tokens: KL on 'all' tokens but padding, or those of the 'completion', which have a label.
        distill_ranks: of an elastic adapter in training with ``RankScheduler("sandwich")``: every step trains the
            largest sub-adapter by this loss, the smallest and a drawn one by t^2 KL(p_largest || p), in three passes.

    The other arguments are the Trainer's. Raises UsageError if teacher and model do not fit.
    """

    def __init__(self, *args: Any, teacher: Any = None, distill_loss: float = 1.0, distill_logits: float = 1.0,
                 distill_blocks: float = 1.0, distill_temperature: float = 1.0, distill_tokens: str = "all",
                 distill_ranks: bool = False, **kwargs: Any) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self._parts = Parts(self.model) if teacher is not None or distill_ranks else None
        self._weights = (distill_loss, distill_logits, distill_blocks)
        self._temperature, self._completion = distill_temperature, distill_tokens == "completion"
        self._teacher: Teacher | CachedTeacher | None = teacher
        if teacher is not None and not isinstance(teacher, (Teacher, CachedTeacher)):
            self._teacher = Teacher(teacher)
        if isinstance(self._teacher, Teacher) and self._parts:
            check_teacher(self._teacher, self._parts, bool(distill_blocks))
            self._teacher.to(self.args.device)
        if isinstance(self._teacher, CachedTeacher) and distill_blocks:
            raise UsageError("a cached teacher has no blocks' outputs: set distill_blocks to 0")
        self._ranks = self._scheduler() if distill_ranks else None
        self._pupil, self._of_largest = False, (torch.empty(0), False)
        self._counts: Tensor = torch.ones(2)
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def _scheduler(self) -> RankScheduler:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RankScheduler) and callback.strategy == "sandwich":
                callback.together = True
                return callback
        raise UsageError("distill_ranks needs elastic ranks in the strategy 'sandwich': RankScheduler('sandwich')")

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of a step; the tokens of all of them together are what the terms are means over."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._parts and samples:
            counts = torch.stack([self._count(batch) for batch in samples]).sum(0).to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                gathered: Any = self.accelerator.gather(counts[None])
                counts = gathered.sum(0) / self.accelerator.num_processes
            self._counts = counts.clamp(min=1 / self.args.world_size)
            self._steps += 1
        return samples, items

    def _count(self, batch: Mapping[str, Any]) -> Tensor:
        """float32 [2]: tokens whose predictions, and whose hidden states are compared."""
        return torch.stack([predicting(batch, self._completion).sum(), real(batch).sum()]).float()

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """With ``distill_ranks`` three forwards and backwards, one after the other; the loss is the largest's."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._ranks is None:
            return loss
        self._pupil = True
        try:
            for ranks in self._ranks.smaller(self.state.global_step):
                self._ranks.take(ranks)
                super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._pupil, self._of_largest = False, (torch.empty(0), False)
        return loss

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:  # fmt: skip
        given = {key: value for key, value in inputs.items() if key != "index"}
        if not (self._parts and model.training):
            return super().compute_loss(model, given, return_outputs, num_items_in_batch)
        counts = self._counts
        if num_items_in_batch is None:
            counts = self._count(inputs).clamp(min=1).to(self.args.device)
        positions = predicting(inputs, self._completion).flatten().nonzero().flatten()
        if self._pupil:
            return self._as_pupil(model, given, positions, num_items_in_batch) / counts[0]
        blocks = self._weights[2] if self._teacher is not None else 0.0
        with self._parts.observed(bool(blocks)) as seen:
            result: Any = super().compute_loss(model, dict(given), return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        rows, made = self._predicted(seen)
        if self._ranks is not None:
            self._of_largest = rows.detach(), made
        loss = self._with_teacher(loss, inputs, seen, rows, made, positions, counts)
        return (loss, result[1]) if return_outputs else loss

    def _with_teacher(self, loss: Tensor, inputs: Any, seen: Seen, rows: Tensor, made: bool, positions: Tensor,
                      counts: Tensor) -> Tensor:  # fmt: skip
        """The loss of labels and what is lost against the teacher, weighted; notes each."""
        self._note("labels_loss", loss)
        if self._teacher is None:
            return loss
        of_labels, of_logits, of_blocks = self._weights
        total = of_labels * loss
        looked, target = None, None
        if isinstance(self._teacher, CachedTeacher):
            target = self._teacher.target(inputs, self._temperature)
        elif of_logits or of_blocks:
            looked = self._teacher.look(inputs, bool(of_blocks), self.accelerator.autocast)
            target = self._teacher.target(looked, self._temperature, self.accelerator.autocast)
        if of_logits and target:
            kl = lost(rows, positions, None if made else self._head, target) / counts[0]
            self._note("logits_loss", kl)
            total = total + of_logits * kl
        if of_blocks and looked:
            mask = real(inputs)
            errors = [block_error(ours[mask], its[mask]).sum()
                      for ours, its in zip(seen.blocks, looked.blocks, strict=True)]  # fmt: skip
            error = torch.stack(errors).mean() / counts[1]
            self._note("blocks_loss", error)
            total = total + of_blocks * error
        return total

    def _as_pupil(self, model: Any, inputs: Any, positions: Tensor, num_items_in_batch: Any) -> Tensor:
        """What a smaller sub-adapter loses against the largest, summed over tokens. The forward gets the labels too,
        for the record of losses."""
        assert self._parts is not None
        known = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        with self._parts.observed() as seen:
            model(**inputs, **(known if self.model_accepts_loss_kwargs else {}))
        rows, made = self._predicted(seen)
        kl = lost(rows, positions, None if made else self._head, self._largest_says())
        self._note("ranks_loss", kl / self._counts[0] / 2)  # of two pupils
        return kl

    def _largest_says(self) -> Target:
        rows, made = self._of_largest

        @torch.no_grad()
        def target(student_TV: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
            logits = rows[positions_T] if made else self._head(rows[positions_T])
            return divergence(student_TV, logits, self._temperature)

        return target

    def _predicted(self, seen: Seen) -> tuple[Tensor, bool]:
        """Rows [N T, V] of logits, or, where a fused loss makes none (TRL), [N T, H] of what the head gets; which."""
        assert self._parts is not None and seen.hidden is not None
        if seen.logits is not None:
            return seen.logits.flatten(0, 1), True
        if self._parts.head_is_trained:  # it needs a gradient too
            return self._head(seen.hidden).flatten(0, 1), True
        return seen.hidden.flatten(0, 1), False

    def _head(self, hidden_TH: Tensor) -> Tensor:
        assert self._parts is not None
        with self.accelerator.autocast():
            return self._parts.head(hidden_TH)

    def _note(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.detach().float()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds each term's mean over the steps since the last entry."""
        if "loss" in logs and self._steps:
            sums: dict[str, Any] = {name: self._sums[name] for name in TERMS if name in self._sums}
            if self.args.world_size > 1:  # each process's is scaled so that their mean is that of all tokens
                sums = {name: self.accelerator.reduce(value, "mean") for name, value in sums.items()}
            logs |= {name: float(value) / self._steps for name, value in sums.items()}
            self._sums, self._steps = {}, 0
        super().log(logs, *args, **kwargs)
