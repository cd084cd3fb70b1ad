"""Locks of those who share a storage: the system, or the database server, lets go of them when their process dies."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from sqft.outputs import hold

# A machine that is gone without a word (no power, no network) is noticed after two minutes.
_PROMPT = ("tcp_keepalives_idle = 60", "tcp_keepalives_interval = 10", "tcp_keepalives_count = 6")


class Locks(Protocol):
    """Of all who share a storage."""

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Holds one lock that all share."""
        ...

    def alive(self, owner: str) -> bool:
        """Whether another one lives, as far as one can know."""
        ...

    def leave(self) -> None:
        """Lets go of this process's own."""
        ...


class Files(Locks):
    """A file for each process, in one folder. Only those that see the folder know of each other: with ``all_seen`` one
    whose file is not there is dead, else it may live elsewhere."""

    def __init__(self, me: str, folder: Path, all_seen: bool) -> None:
        self._me, self._folder, self._all_seen = me, folder, all_seen
        self._held: int | None = None
        while self._held is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the last of others just left
                self._held = hold(self._folder / me)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        handle = None
        while handle is None:
            handle = hold(self._folder / "lock", wait=True)
        try:
            yield
        finally:
            os.close(handle)

    def alive(self, owner: str) -> bool:
        if not (self._folder / owner).exists():
            return not self._all_seen
        try:
            handle = hold(self._folder / owner)
        except BlockingIOError:
            return True
        if handle is not None:
            os.close(handle)
        return False

    def leave(self) -> None:
        with self.alone():
            (self._folder / self._me).unlink(missing_ok=True)
            if [path.name for path in self._folder.iterdir()] == ["lock"]:
                (self._folder / "lock").unlink()
        if self._held is not None:
            os.close(self._held)
        with contextlib.suppress(OSError):  # others are there
            self._folder.rmdir()


class Sessions(Locks):
    """Advisory locks of a PostgreSQL server, which hold as long as the connection that took them."""

    def __init__(self, me: str, url: str) -> None:
        self._me, self._engine = me, create_engine(url, isolation_level="AUTOCOMMIT", pool_size=1)
        self._connect()

    def _connect(self) -> None:
        self._connection = self._engine.connect()
        for setting in _PROMPT:
            self._connection.execute(text(f"SET {setting}"))
        self._ask("pg_advisory_lock", self._me)

    def _ask(self, function: str, name: str) -> Any:
        key = int.from_bytes(hashlib.sha256(f"sqft {name}".encode()).digest()[:8], "big", signed=True)
        return self._connection.execute(text(f"SELECT {function}(:key)"), {"key": key}).scalar()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        try:
            self._ask("pg_advisory_lock", "lock")
        except DBAPIError:  # the connection was lost (the server started anew, say), and with it this process's lock
            self._connection.close()
            self._connect()
            self._ask("pg_advisory_lock", "lock")
        try:
            yield
        finally:
            self._ask("pg_advisory_unlock", "lock")

    def alive(self, owner: str) -> bool:
        if owner != self._me and self._ask("pg_try_advisory_lock", owner):
            self._ask("pg_advisory_unlock", owner)
            return False
        return True

    def leave(self) -> None:
        self._connection.close()
        self._engine.dispose()
