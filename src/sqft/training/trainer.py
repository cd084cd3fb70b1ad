"""The Trainer that trains: its data are divided among processes so that any number of them takes the steps of one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from sqft.config import TrainConfig
from sqft.errors import UsageError
from sqft.kernels.halves import fast_halves
from sqft.processes import count
from sqft.training.data import IGNORED, Row
from sqft.training.distill import Distill
from sqft.training.labels import LabelsLoss, labels_loss
from sqft.training.sharding import adapter_state, is_sharded, whole_states


def share(config: TrainConfig) -> int:
    """Sequences of ``batch_size`` that each process takes. Raises UsageError if it cannot be divided."""
    if config.batch_size % count():
        raise UsageError(f"batch_size {config.batch_size} is of all processes together, and cannot be divided among "
                         f"{count()}: make it a multiple (--batch-size {count()})")  # fmt: skip
    return config.batch_size // count()


class Order(Sampler[int]):
    """The order of the rows in an epoch, a function of seed and epoch alone. Among several processes the last batch is
    filled up with ``blanks``: rows without a label, which change neither the loss nor its gradient."""

    def __init__(self, rows: Sequence[Row], config: TrainConfig, epoch: Callable[[], int]) -> None:
        self._lengths = [len(row["input_ids"]) for row in rows]
        self._config, self._epoch = config, epoch
        self._blanks = -len(rows) % config.batch_size if count() > 1 else 0

    def __len__(self) -> int:
        return len(self._lengths) + self._blanks

    def __iter__(self) -> Iterator[int]:
        config, rows = self._config, len(self._lengths)
        generator = torch.Generator().manual_seed(config.seed + self._epoch())
        if config.group_by_length and not config.packing:
            together = config.batch_size * config.gradient_accumulation
            order = get_length_grouped_indices(self._lengths, together, generator=generator)
        else:
            order = torch.randperm(rows, generator=generator).tolist()
        yield from order + [rows] * self._blanks


class SqftTrainer(Distill, Trainer):
    """Without a teacher, as Trainer trains; ``config`` says in which order, and ``args`` has a process's share. Raises
    UsageError where accelerate is told to divide the model in its own way."""

    def __init__(self, *args: Any, config: TrainConfig, train_dataset: list[Row], **kwargs: Any) -> None:
        self._config, rows = config, len(train_dataset)
        self._order = Order(train_dataset, config, self._epoch)
        blank = {key: [IGNORED if key == "labels" else 0] for key in train_dataset[0]}
        if len(self._order) > rows:
            train_dataset = [*train_dataset, blank]
        super().__init__(*args, train_dataset=train_dataset, **kwargs)  # pyright: ignore[reportArgumentType]
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UsageError("accelerate's configuration asks for DeepSpeed or its FSDP, which would train another "
                             "model than is merged: launch with torchrun, with --parallel fsdp if need be")  # fmt: skip
        self._sharded = is_sharded(cast(nn.Module, self.model))
        with fast_halves(cast(nn.Module, self.model)):
            self._labels = None if self._parts or self._sharded else labels_loss(self.model)
        self.is_distributed_loading_by_transformers = self._sharded  # what Trainer calls a model that it must not wrap

    def _epoch(self) -> int:
        steps = math.ceil(len(self._order) / (self._config.batch_size * self._config.gradient_accumulation))
        return self.state.global_step // steps

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:  # fmt: skip
        if self._labels is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._labels:
            return super().compute_loss(model, {**inputs, **LabelsLoss.ONE}, return_outputs, num_items_in_batch)

    def create_optimizer(self, model: Any = None) -> Any:
        fresh, optimizer = self.optimizer is None, super().create_optimizer(model)
        if fresh and self._sharded:
            whole_states(optimizer)
        return optimizer

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        yield  # every micro-batch's gradients are divided at once: none is held whole

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded and not self.args.should_save:
            cast(Any, self.optimizer).state_dict()  # the main process gathers it
        super()._save_optimizer_and_scheduler(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, adapter_state(cast(nn.Module, self.model)) if self._sharded else state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._sharded:  # else it was divided with that in it
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Every process evaluates all, in whole batches: a mean over batches depends on how they are cut."""
        if count() == 1:
            return super().get_eval_dataloader(eval_dataset)
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = DataLoader(rows, self.args.eval_batch_size, collate_fn=self.data_collator)
        state = self.accelerator.gradient_state

        def kept(losses_N: Tensor) -> Tensor:
            last = state.end_of_dataloader and state.remainder > 0
            return losses_N[: state.remainder] if last else losses_N

        self.gather_function = kept  # for this evaluation
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)
