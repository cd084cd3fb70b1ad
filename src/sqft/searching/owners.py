"""Which process works on a trial, for all that share a storage: each holds a lock of its own, which the system, or the
database server, lets go of when the process dies, on whatever machine that was."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from optuna.study import Study
from optuna.trial import Trial, TrialState
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from sqft.outputs import hold

OWNER = "owner"
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


class Owners:
    """Those who work on the trials of one storage, and this process, ``me``, among them.

    They know each other by files beside the storage's file, or by sessions of a PostgreSQL server; by files in ``work``
    with another server: there whether those who work elsewhere are dead is not known, and their trials stay theirs.
    """

    def __init__(self, url: str, work: Path) -> None:
        self.me, file = uuid.uuid4().hex, storage_file(url)
        if file is None and make_url(url).get_backend_name() == "postgresql":
            self._locks: Locks = Sessions(self.me, url)
        else:
            folder = (work / "owners") if file is None else file.with_name(f"{file.name}.owners")
            self._locks = Files(self.me, folder, all_seen=file is not None)

    def begin(self, study: Study) -> Trial:
        """A new trial, which is this process's: it is begun and given an owner in one step."""
        with self._locks.alone():
            trial = study.ask()
            trial.set_user_attr(OWNER, self.me)
        return trial

    def take_over(self, study: Study) -> list[int]:
        """Trials that a process began and did not live to finish; they are this one's from now on."""
        with self._locks.alone():
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            owned = [(trial, trial.user_attrs.get(OWNER)) for trial in running]
            left = [trial for trial, owner in owned if owner is None or not self._locks.alive(owner)]
            for trial in left:
                study._storage.set_trial_user_attr(trial._trial_id, OWNER, self.me)
        return [trial.number for trial in left]

    def leave(self) -> None:
        """When this process's trials are all finished."""
        self._locks.leave()


def storage_file(url: str) -> Path | None:
    """The file that a storage keeps its trials in; None for a database server."""
    if url.startswith("journal:"):
        return Path(url.removeprefix("journal:"))
    found = make_url(url)
    return Path(found.database) if found.get_backend_name() == "sqlite" and found.database else None
