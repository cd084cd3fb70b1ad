"""Whom a student learns from: a frozen model, or what that said of every training row, kept on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from sqft.adapters.kinds import layer_kind
from sqft.adapters.peft_bridge import adapter_layers
from sqft.config import TrainConfig
from sqft.errors import UsageError
from sqft.folders import load
from sqft.models.types import Tokenizer
from sqft.outputs import broken, seal
from sqft.processes import alone
from sqft.training.data import Row, collate, padding
from sqft.training.distillation import CHUNK_ELEMENTS, Target, divergence, divergence_of_most_probable, most_probable
from sqft.training.parts import Parts, Seen

NOT_OF_THE_MODEL = ("labels", "shift_labels", "index", "use_cache", "num_items_in_batch")
Autocast = Callable[..., AbstractContextManager[Any]]


def real(inputs: Mapping[str, Any]) -> Tensor:
    """bool [N, T]: what is not padding, and no row of a single token, which fills up a batch."""
    mask = inputs.get("attention_mask")
    whole = mask.bool() if mask is not None and mask.dim() == 2 else inputs["input_ids"] == inputs["input_ids"]
    return whole & (whole.sum(1, keepdim=True) > 1)


def predicting(inputs: Mapping[str, Any], completion: bool = False) -> Tensor:
    """bool [N, T]: tokens after which one comes; with ``completion``, one that has a label."""
    if completion and "shift_labels" in inputs:
        return inputs["shift_labels"] != -100
    follows = inputs["labels"] != -100 if completion else real(inputs)
    return real(inputs) & torch.nn.functional.pad(follows[:, 1:], (0, 1))


class Teacher:
    """A model that is frozen, and put into eval mode. ``look`` runs it; nothing of it has a gradient."""

    def __init__(self, model: Any) -> None:
        model.requires_grad_(False)
        self.parts = Parts(model.eval())

    def to(self, device: torch.device) -> None:
        self.parts.model.to(device)

    @torch.no_grad()
    def look(self, inputs: Mapping[str, Any], blocks: bool, autocast: Autocast) -> Seen:
        """Hidden states before the head, without logits; with ``blocks``, the blocks' outputs."""
        given = {key: value for key, value in inputs.items() if key not in NOT_OF_THE_MODEL}
        with self.parts.observed(blocks) as seen, autocast():
            self.parts.backbone(**given, use_cache=False)
        return seen

    def target(self, seen: Seen, temperature: float, autocast: Autocast) -> Target:
        """What it says of the tokens that it has seen."""
        assert seen.hidden is not None
        hidden = seen.hidden.flatten(0, 1)

        @torch.no_grad()
        def target(student_TV: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
            with autocast():
                logits = self.parts.head(hidden[positions_T])
            return divergence(student_TV, logits, temperature)

        return target


class CachedTeacher:
    """Log-probabilities of the K most probable tokens after every token of every training row: float16 and int32 of
    [M, K], rows one after the other; ``starts`` [rows + 1] says where each begins."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.values, self.indices, self.starts = (tensors[key] for key in ("values", "indices", "starts"))

    @classmethod
    def of(cls, teacher: Teacher, rows: Sequence[Row], k: int, temperature: float, file: Path, *, fill: int,
           batch_size: int, autocast: Autocast) -> CachedTeacher:  # fmt: skip
        """Lets the teacher look at every row once, unless ``file`` is there; its folder is sealed when it is whole."""

        def write() -> None:
            if not broken(file.parent):
                return
            said: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(rows)
            order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
            for start in tqdm(range(0, len(rows), batch_size), desc="Teacher", unit="batch", disable=None):
                numbers = order[start : start + batch_size]
                said_of = teacher_says(teacher, [rows[i] for i in numbers], k, temperature, fill, autocast)
                for i, row in zip(numbers, said_of, strict=True):
                    said[i] = row
            lengths = torch.tensor([0, *(len(values) for values, _ in said)])
            values, indices = (torch.cat(parts).contiguous() for parts in zip(*said, strict=True))
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"values": values, "indices": indices, "starts": lengths.cumsum(0)}, file)
            seal(file.parent)

        alone(write)
        return cls(load_file(file))

    def to(self, device: torch.device) -> None:
        """It stays where it is: a batch's part is moved."""

    def target(self, inputs: Mapping[str, Any], temperature: float) -> Target:
        """What it says of a batch's tokens; ``inputs["index"]`` int64 [N]: which rows of the training data they are."""
        if "index" not in inputs:
            raise UsageError("a cached teacher needs to know the rows: the batch has no column 'index'")
        mask = real(inputs)
        place = (inputs["index"].view(-1, 1).cpu(), (mask.cumsum(1) - 1).cpu())  # of the tokens in their rows
        flat = (self.starts[place[0]] + place[1]).flatten()

        def target(student_TV: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
            at = flat[positions_T.cpu()]
            log_p, index = (part[at].to(student_TV.device) for part in (self.values, self.indices))
            return divergence_of_most_probable(student_TV, log_p, index, temperature)

        return target


@torch.no_grad()
def teacher_says(teacher: Teacher, rows: Sequence[Row], k: int, temperature: float, fill: int,
                 autocast: Autocast) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """(log-probabilities, indices), each [T - 1, K], of rows of T tokens."""
    device = teacher.parts.causal.get_input_embeddings().weight.device
    inputs = {key: value.to(device) for key, value in collate(rows, fill).items()}
    hidden = teacher.look(inputs, False, autocast).hidden
    assert hidden is not None
    with autocast():
        chunk = max(1, CHUNK_ELEMENTS // teacher.parts.causal.get_output_embeddings().weight.shape[0])
        parts = [most_probable(teacher.parts.head(part), k, temperature)
                 for part in hidden[predicting(inputs)].split(chunk)]  # fmt: skip
    values, indices = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    counts = [len(row["input_ids"]) - 1 for row in rows]
    return list(zip(values.split(counts), indices.split(counts), strict=True))


def load_teacher(source: str, student: Any, tokenizer: Tokenizer, blocks: bool, device: torch.device) -> Teacher:
    """The teacher of a folder or hub name; an adapter on a float base is merged into it, which is faster and as good.
    Raises UsageError if it has another vocabulary than the student, or (of ``blocks``) other blocks."""
    model, its_tokenizer = load(source, device=str(device))
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UsageError(f"teacher {source} has another vocabulary than the model ({len(its_tokenizer)} and "
                         f"{len(tokenizer)} tokens): distillation compares predictions token by token")  # fmt: skip
    layers = adapter_layers(model)
    if layers and not any(layer_kind(layer).packed for layer in layers.values()):
        model = model.merge_and_unload()
    teacher = Teacher(model)
    check_teacher(teacher, student if isinstance(student, Parts) else Parts(student), blocks, source)
    return teacher


def check_teacher(teacher: Teacher, student: Parts, blocks: bool, name: str = "") -> None:
    """Raises UsageError if the sizes of teacher and student do not fit."""
    one, two = teacher.parts, student
    sizes = [parts.causal.get_output_embeddings().weight.shape[0] for parts in (one, two)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"teacher {name} predicts {sizes[0]} tokens, the model {sizes[1]}: take one of the same vocabulary"
        )
    shapes = [(len(parts.blocks), parts.width) for parts in (one, two)]
    if blocks and shapes[0] != shapes[1]:
        raise UsageError(f"teacher {name} has {shapes[0][0]} blocks of width {shapes[0][1]}, the model {shapes[1][0]} "
                         f"of {shapes[1][1]}: their outputs cannot be compared; set distill_blocks to 0")  # fmt: skip


def autocast_of(precision: str, device: torch.device) -> Autocast:
    """As Accelerate computes in this precision."""
    if precision not in ("bfloat16", "float16"):
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, getattr(torch, precision))


def distillation_of(config: TrainConfig, model: Any, tokenizer: Tokenizer, rows: list[Row], work: Path,
                    device: torch.device) -> tuple[list[Row], dict[str, Any]]:  # fmt: skip
    """What ``Distill`` is to be told, and the rows, with their indices where a cache needs them. Raises UsageError for
    a teacher that does not fit."""
    given: dict[str, Any] = {"distill_ranks": config.distill_ranks, "distill_temperature": config.distill_temperature,
                             "distill_tokens": config.distill_tokens}  # fmt: skip
    if config.distill is None:
        return rows, given
    blocks = 0.0 if config.distill_cache else 1.0 if config.distill_blocks is None else config.distill_blocks
    teacher: Teacher | CachedTeacher = load_teacher(config.distill, model, tokenizer, bool(blocks), device)
    if config.distill_cache:
        rows = [{**row, "index": [i]} for i, row in enumerate(rows)]
        teacher = CachedTeacher.of(
            teacher, rows, config.distill_cache, config.distill_temperature, work / "teacher" / "said.safetensors",
            fill=padding(tokenizer), batch_size=config.batch_size, autocast=autocast_of(config.precision, device),
        )  # fmt: skip
    weights = {"distill_loss": config.distill_loss, "distill_logits": config.distill_logits, "distill_blocks": blocks}
    return rows, {**given, **weights, "teacher": teacher}
