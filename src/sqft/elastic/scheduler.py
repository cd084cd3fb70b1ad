"""Which sub-adapter a training step trains: a Trainer callback that sets ranks, works with any Trainer, and records."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from sqft.adapters.groups import Ranks
from sqft.adapters.lora import active_rank
from sqft.elastic.handle import Elastic
from sqft.errors import UsageError
from sqft.models.weights import first_row, local
from sqft.processes import count

STRATEGIES = ("uniform", "sandwich", "weighted")


class RankScheduler(TrainerCallback, ExportableState):
    """Sets the ranks of a super-adapter before every optimiser step, or before every micro-batch.

    The draw is a function of seed, step and micro-batch alone: it is the same on all processes of a distributed run
    and after a resume, and no other random number changes it. Between steps (evaluation, checkpoints) the largest
    sub-adapter is set. Ranks that took no part in a step are not moved by the optimiser's momentum.

    Args:
        strategy: 'uniform' draws each group's rank; 'sandwich' takes the largest, the smallest and a drawn sub-adapter
            in turn (all three in every step, where ``sqft.Distill`` is told to); 'weighted' draws ranks with a
            probability in proportion to their size.
        micro_batches: draw for every micro-batch, instead of for every optimiser step.
        seed: of the draws.

    ``records`` holds one pair for every draw: the choice of each group (its index among the choices, the largest
    first) and the mean training loss under it. They are part of the Trainer's checkpoints.
    """

    def __init__(self, strategy: str = "uniform", micro_batches: bool = False, seed: int = 42) -> None:
        if strategy not in STRATEGIES:
            raise UsageError(f"unknown rank strategy '{strategy}': {', '.join(STRATEGIES)}")
        self.strategy, self.micro_batches, self.seed = strategy, micro_batches, seed
        self.together = False  # the largest, the smallest and a drawn one in every step: ``Distill`` says so
        self.records: list[tuple[list[int], float]] = []
        self._losses: list[Tensor] = []  # since ranks were last set
        self._step: list[tuple[list[int], Tensor]] = []
        self._is_share = False  # whether losses are shares of those of all processes
        self._hook: Any = None
        self._micro = 0
        self._used: dict[str, int] = {}  # the largest rank of each layer in this step
        self._kept: list[tuple[Tensor, Tensor]] = []

    def state(self) -> dict[str, Any]:
        arguments = {"strategy": self.strategy, "micro_batches": self.micro_batches, "seed": self.seed}
        return {"args": arguments, "attributes": {"records": self.records}}

    def draw(self, groups: Any, step: int, micro: int, micro_batches: int) -> Ranks:
        """The ranks of one step or micro-batch."""
        rng = random.Random(f"{self.seed}/{step}/{micro}")
        turn = (step * micro_batches + micro if self.micro_batches else step) % 3 if not self.together else 0
        if self.strategy == "sandwich" and turn < 2:
            return {group.name: group.choices[-turn] for group in groups}  # the largest, the smallest
        if self.strategy == "weighted":
            return {group.name: rng.choices(group.choices, weights=group.choices)[0] for group in groups}
        return {group.name: rng.choice(group.choices) for group in groups}

    def smaller(self, step: int) -> list[Ranks]:
        """Of a step that trains several sub-adapters, those after the largest: the smallest, and a drawn one."""
        rng = random.Random(f"{self.seed}/{step}/{self._micro if self.micro_batches else 0}")
        groups = self._elastic.groups
        return [{g.name: g.choices[-1] for g in groups}, {g.name: rng.choice(g.choices) for g in groups}]

    def take(self, ranks: Ranks) -> None:
        """Sets other ranks within a step, after what was computed with the ones that are set, its backward too."""
        self._note()
        self._ranks = ranks
        self._elastic.set(ranks)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if args.deepspeed:
            raise UsageError("elastic ranks do not go with DeepSpeed, which steps within backward: use DDP or FSDP2")
        self._elastic = Elastic(model)
        if not self._elastic.groups:
            raise UsageError("the adapter's rank is fixed: give its config a search_space, e.g. [32, 24, 16]")
        callbacks: Any = state.stateful_callbacks or {}
        stored = callbacks.get(type(self).__name__)
        if stored:  # of the checkpoint that is resumed
            last = stored[-1] if isinstance(stored, list) else stored
            self.records = [(list(c), loss) for c, loss in last["attributes"]["records"]]
        self._hook = model.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, module: Any, arguments: Any, given: Any, out: Any) -> None:
        loss = out.get("loss") if isinstance(out, dict) else getattr(out, "loss", None)
        if module.training and isinstance(loss, Tensor):
            self._losses.append(loss.detach().clone())  # Trainer scales it in place
            self._is_share = given.get("num_items_in_batch") is not None

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._micro, self._used, self._losses, self._step = 0, {}, [], []
        self._set(args, state)

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._micro += 1
        if self.micro_batches or self.together:
            self._note()
            self._set(args, state)

    def _set(self, args: TrainingArguments, state: TrainerState) -> None:
        self._ranks = self.draw(self._elastic.groups, state.global_step, self._micro, args.gradient_accumulation_steps)
        self._elastic.set(self._ranks)
        for path, layer in self._elastic.layers.items():
            self._used[path] = max(self._used.get(path, 0), active_rank(layer, self._elastic.adapter))

    def _note(self) -> None:
        """Keeps the loss under the ranks that are set, until the step ends."""
        if self._losses:
            choices = [group.choices.index(self._ranks[group.name]) for group in self._elastic.groups]
            self._step.append((choices, torch.stack(self._losses).sum()))
        self._losses = []

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._kept = [(part, part.clone()) for part in self._inactive()]

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for part, before in self._kept:
                part.copy_(before)
        self._kept = []

    def _inactive(self) -> Iterator[Tensor]:
        """The rows of A and columns of B that this step did not use."""
        name = self._elastic.adapter
        for path, layer in self._elastic.layers.items():
            used = self._used[path]
            if used < layer.r[name]:
                a, b = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
                yield local(a)[max(0, used - first_row(a)) :]
                yield local(b)[:, used:]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._note()
        # A micro-batch's loss is its share of the step's mean, a process's of all processes' or a mean of its own.
        times = self._micro + 1 if self.micro_batches or self.together else 1
        if self._step:
            losses = torch.stack([loss for _, loss in self._step])
            if count() > 1:
                torch.distributed.all_reduce(losses)
                times /= 1 if self._is_share and args.average_tokens_across_devices else count()
            self.records += [(choices, loss * times)
                             for (choices, _), loss in zip(self._step, losses.tolist(), strict=True)]  # fmt: skip
        self._elastic.set()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._hook.remove()
        self._elastic.set()
