"""What a task is: where its examples come from and how an answer is scored."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One problem. What is learnt and generated follows ``prompt`` as ``completion``, which begins with the space or
    line break between them; neither holds special tokens.

    A multiple-choice problem has ``options``, the (context, continuation) of each, of which ``gold`` is right; its
    prompt and completion are those of the right one. ``task`` is the name of the task that it belongs to.
    """

    prompt: str
    completion: str
    answer: str = ""
    options: tuple[tuple[str, str], ...] = ()
    gold: int = -1
    task: str = ""


class Task(Protocol):
    """A task with a train, a validation and a test split. ``test`` is what is reported, ``validation`` what choices
    are made by."""

    @property
    def name(self) -> str: ...
    @property
    def splits(self) -> Collection[str]: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def stop(self) -> Sequence[str]:
        """Generation is cut at the first of these strings."""
        ...

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """The first ``limit`` examples of a split. Raises UsageError if there is no such split."""
        ...

    def is_correct(self, generated: str, example: Example) -> bool: ...


def same_problem(example: Example) -> tuple[str, ...]:
    """What two examples that ask the same have in common: question and options, without case, spacing and order."""
    texts = [context + continuation for context, continuation in example.options] or [example.prompt]
    return tuple(sorted(" ".join(text.lower().split()) for text in texts))


def without_duplicates(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """The examples that are not among the ``others``."""
    seen = {same_problem(example) for example in others}
    return [example for example in examples if same_problem(example) not in seen]
