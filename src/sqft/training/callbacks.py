"""Trainer callbacks: a progress bar on standard error (the Trainer's own writes to standard output), the time, and what
may not go on."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sqft.errors import SqftError
from sqft.models.weights import local
from sqft.outputs import UNFINISHED, broken, seal
from sqft.processes import count


class ProgressBar(TrainerCallback):
    """One bar for the whole training, with the latest losses."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Train", unit="step", disable=None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        self._shown.update({k: f"{float(logs[k]):.3f}" for k in ("loss", "eval_loss") if k in logs})
        if self._bar is not None:
            self._bar.set_postfix(self._shown)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.close()


class Stopwatch(TrainerCallback):
    """Seconds of training, those before an interruption included: every checkpoint keeps them. It is the last callback,
    and says of a checkpoint that it is whole."""

    FILE = "seconds.txt"

    def __init__(self, checkpoint: Path | None) -> None:
        file = checkpoint / self.FILE if checkpoint else None
        before = float(file.read_text()) if file and file.is_file() else 0.0
        self._started = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            (folder / self.FILE).write_text(f"{self.seconds:.2f}")
        if count() > 1:
            torch.distributed.barrier()  # the others have written what is theirs
        if state.is_world_process_zero:
            seal(folder)


class Attention(TrainerCallback):
    """Lets a model compute attention in another way while it is trained."""

    def __init__(self, implementation: str) -> None:
        self._other = implementation

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._swap(kwargs["model"])

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._swap(kwargs["model"])

    def _swap(self, model: Any) -> None:
        before = model.config._attn_implementation
        model.set_attn_implementation(self._other)
        self._other = before


class Finished(Exception):
    """What is resumed was trained to its end already."""


def checkpoints(work: Path) -> list[Path]:
    """Those of a training, whole or not, the newest first."""
    return sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)


def last_checkpoint(work: Path) -> Path | None:
    """The newest whole checkpoint. Says so if a newer one was whole, and is damaged."""
    for path in checkpoints(work):
        if not (problem := broken(path)):
            return path
        if problem != UNFINISHED:
            print(f"sqft: {path} is damaged ({problem}): it is passed over", file=sys.stderr)
    return None


class Guard(TrainerCallback):
    """Ends a training that has diverged, before the weights are moved or saved, and one that is resumed at its end: the
    Trainer would train another step. Before every checkpoint the loss is logged, so that a resumed run's log is a
    straight one's.

    A loss that is not finite has a gradient that is not, so every step's gradient is looked at (float16's may be: its
    steps are skipped). ``learn_scales``: whether scales are trained, which is then one more thing to try without.
    """

    def __init__(self, learn_scales: bool = False) -> None:
        self._learn_scales = learn_scales

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                              **kwargs: Any) -> None:  # fmt: skip
        if not args.fp16:
            gradients = [local(p.grad) for p in kwargs["model"].parameters() if p.grad is not None]
            finite = not gradients or bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all())
            self._check(finite, "the gradient is", args, state.global_step + 1)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise Finished

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save or control.should_training_stop:
            control.should_log = True
            finite = all(bool(local(p).isfinite().all()) for p in kwargs["model"].parameters() if p.requires_grad)
            self._check(finite, "trained weights are", args, state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, value in (kwargs.get("logs") or {}).items():
            self._check(not name.endswith("loss") or math.isfinite(value), f"{name} is", args, state.global_step)

    def _check(self, finite: bool, what: str, args: TrainingArguments, step: int) -> None:
        if finite:
            return
        precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else ""
        tries = [f"lower the learning rate (it is {args.learning_rate:g})",
                 f"warm up longer (it is {args.warmup_steps:g} steps, at most a tenth of all)",
                 *([f"train in float32 (it is {precision})"] if precision else []),
                 *(["leave learn_scales out"] if self._learn_scales else [])]  # fmt: skip
        kept = last_checkpoint(Path(args.output_dir or ""))
        said = f"; the last good checkpoint is kept, an adapter folder: {kept}" if kept else ""
        raise SqftError(f"training has diverged: at step {step} {what} not finite; {', or '.join(tries)}. Nothing was "
                        f"written{said}. Other options begin anew (a checkpoint has its own optimizer and "
                        "schedule), the same ones would diverge again")  # fmt: skip
