"""A small lazy registry: a name stands for "module:attribute" and is imported when it is first used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from sqft.errors import UsageError, did_you_mean


class Registry:
    """Names of one kind of thing (``kind`` is the word used in messages), e.g. sparsifiers."""

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> Any:
        """The registered object. Raises UsageError, with the near miss, for an unknown name."""
        if name not in self._entries:
            raise UsageError(f"unknown {self.kind} '{name}': {did_you_mean(name, self._entries)}")
        module, attribute = self._entries[name].split(":")
        return getattr(import_module(module), attribute)
