"""What a task is: where its examples come from and how an answer is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sqft.registry import Registry


@dataclass(frozen=True)
class Example:
    """One problem. ``prompt`` ends without a space, ``completion`` starts with one; neither holds special tokens."""

    prompt: str
    completion: str
    answer: str = ""


class Task(Protocol):
    """A task with a train, a validation and a test split that share no problem."""

    @property
    def name(self) -> str: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def stop(self) -> tuple[str, ...]:
        """Generation is cut at the first of these strings."""
        ...

    def examples(self, split: str, limit: int | None = None) -> list[Example]: ...
    def is_correct(self, generated: str, example: Example) -> bool: ...


TASKS = Registry("task", {"arithmetic": "sqft.tasks.arithmetic:ArithmeticTask"})


def get_task(name: str) -> Task:
    """The task of that name, with its default problems. Raises UsageError for an unknown one."""
    return TASKS[name]()
