"""Trainer callbacks: a progress bar on standard error (the Trainer's own writes to standard output), the time, and what
may not go on."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sqft.errors import SqftError


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
    """Seconds of training, those before an interruption included: every checkpoint keeps them."""

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
        (folder / self.FILE).write_text(f"{self.seconds:.2f}")


class Finished(Exception):
    """What is resumed was trained to its end already."""


class Guard(TrainerCallback):
    """Ends a training that has diverged before it is saved, and one that is resumed at its end: the Trainer would train
    another step. Before every checkpoint the loss is logged, so that a resumed run's log is a straight one's."""

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise Finished

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save or control.should_training_stop:
            control.should_log = True
            finite = all(bool(p.isfinite().all()) for p in kwargs["model"].parameters() if p.requires_grad)
            self._check(finite, "trained weights are", args, state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, value in (kwargs.get("logs") or {}).items():
            self._check(not name.endswith("loss") or math.isfinite(value), f"{name} is", args, state)

    def _check(self, finite: bool, what: str, args: TrainingArguments, state: TrainerState) -> None:
        if not finite:
            raise SqftError(f"training has diverged: at step {state.global_step} {what} not finite; lower the learning "
                            f"rate (it is {args.learning_rate:g})")  # fmt: skip
