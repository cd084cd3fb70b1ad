"""A task: is a number even?"""

from sqft.errors import UsageError
from sqft.tasks.base import SPLITS, Example


class Parity:
    name, splits, max_new_tokens, stop = "parity", SPLITS, 4, ("\n",)

    def examples(self, split, limit=None):
        if split not in SPLITS:
            raise UsageError(f"task parity has no split '{split}'")
        numbers = range(SPLITS.index(split), 90, 3)[:limit]
        return [Example(f"Is {n} even?", " no" if n % 2 else " yes", "no" if n % 2 else "yes") for n in numbers]

    def is_correct(self, generated, example):
        return generated.strip() == example.answer


PARITY = Parity()
